"""CacheEngine: one transformer wired for a step cache. It decides, keeps, makes up, and counts."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.adapters import arguments_of, find_adapter, parallel
from dit_accel.caches import walk
from dit_accel.caches.boundaries import make_boundary
from dit_accel.caches.cache import NEVER, Cache, Parts, View
from dit_accel.caches.memory import Entry, Memory
from dit_accel.caches.off import Off
from dit_accel.caches.parts.measures import relative_l1, worst
from dit_accel.caches.schedule import Decisions, parse_schedule
from dit_accel.caches.trials import Trial
from dit_accel.errors import UsageError
from dit_accel.hooks import Listener
from dit_accel.report import Tally
from dit_accel.trajectory import Call, Context, Trajectory

if TYPE_CHECKING:
    from dit_accel.caches.boundaries.boundary import Hooked
    from dit_accel.engine import Engine

LISTENER = "dit_accel_cache_context"


@dataclass
class Verdict:
    """What was decided about one forward, and what comes of it if it returns."""

    call: Call
    reuse: bool
    reason: str = ""  # why it is computed
    entry: Entry | None = None  # None: nothing of this forward is kept
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    expected: float = NEVER  # the error, where it was judged


class CacheEngine:
    """A step cache on one transformer. It takes over from one that is there.

    Args:
        transformer: of a known family.
        cache: what is kept, and when it serves; `Off` has forwards counted alone.
        trajectory: the clock; shared by the experts of one pipeline.
        tally: what ran; shared likewise.
        role: which transformer of the pipeline this is.
        sparse: sparse attention's engine on the same transformer, which then reads the clock for both.

    Raises:
        UnknownModelError: a transformer of no known family.
        UsageError: blocks that this cache cannot leave out. Nothing has been touched then.
    """

    def __init__(
        self,
        transformer: nn.Module,
        cache: Cache,
        trajectory: Trajectory,
        tally: Tally,
        role: str,
        sparse: Engine | None = None,
    ) -> None:
        self.adapter = find_adapter(transformer)
        self.cache, self.trajectory, self.tally, self.role, self.sparse = cache, trajectory, tally, role, sparse
        self.trials: list[Trial] = []
        self.decisions = Decisions()  # of the latest run
        self._plans = None if cache.schedule is None else parse_schedule(cache.schedule)
        self.memory = Memory(cache.store_device)
        self.given: dict[str, Any] | None = None  # arguments of the forward under way
        self.call: Call | None = None
        self._boundary = make_boundary(self)
        self._module = weakref.ref(transformer)
        self._names = tuple(inspect.signature(inspect.unwrap(type(transformer).forward)).parameters)[1:]
        self._shared: tuple[int, bool] | None = None  # what the first branch of a step decided
        # of the forward seen last, as `declare` takes it
        self._size: tuple[tuple[int, ...], int, int, int] | None = None
        self._listener: Listener | None = None
        self._removers: list[Callable[[], None]] = []  # the root's first
        hooked = self._boundary.hooks(transformer)
        remove_cache(transformer)
        self._wire(transformer, hooked)
        if self.sparse is None:
            self._listener = Listener(self.trajectory, LISTENER)
            self._listener.join(transformer)
        transformer._diffusers_hook.invalidate_child_registries_cache()
        trajectory.on_new_run(self._begin)

    # -- installing and removing

    def _wire(self, transformer: nn.Module, hooked: list[Hooked]) -> None:
        try:
            self._removers.append(walk.set_hook(transformer, walk.RootHook(self), walk.ROOT))
            for module, hook in hooked:
                self._removers.append(walk.set_hook(module, hook, walk.BLOCK))
        except BaseException:
            self.remove()
            raise

    def _follow(self) -> None:
        """Hook the modules anew where the transformer has others by now. What was kept is of the former ones."""
        module = self._module()
        if self._boundary.is_current(module):
            return
        while len(self._removers) > 1:
            self._removers.pop()()
        for part, hook in self._boundary.hooks(module):
            self._removers.append(walk.set_hook(part, hook, walk.BLOCK))
        module._diffusers_hook.invalidate_child_registries_cache()
        self.memory.clear()

    def remove(self) -> None:
        """Take every hook away and forget everything. Does nothing the second time."""
        module = self._module()
        if not self._removers or module is None:
            return
        if self._listener is not None:
            self._listener.part(module)
        for remove in reversed(self._removers):
            remove()
        self._removers = []
        self.memory.clear()
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            registry.invalidate_child_registries_cache()

    @property
    def installed(self) -> bool:
        return bool(self._removers)

    @property
    def transformer(self) -> nn.Module:
        return self._module()

    def bytes_held(self) -> int:
        """Memory kept between forwards."""
        return self.memory.bytes_held()

    # -- one forward

    def run(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The transformer's forward: computed, or made up."""
        self._follow()
        call = self._enter(args, kwargs)
        if call is None:
            return original(*args, **kwargs)
        try:
            output = self._boundary.run(call, original, args, kwargs)
        except BaseException:
            self._begin()  # what was learnt may be of a forward that went wrong
            raise
        finally:
            self.given = self.call = None
            self._boundary.clear()
        if self.sparse is None or not self.sparse.installed:
            self.trajectory.leave(self.role)
        return output

    @torch.compiler.disable
    def _enter(self, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        """What this forward is part of; None if that cannot be told."""
        given = arguments_of(self.adapter, self._names, args, kwargs)
        if given is None:
            return None  # the host is about to say so better
        if self.sparse is not None and self.sparse.installed:
            self.call = self.sparse.call
        else:
            facts = self.adapter.read(self._module(), given)
            context = Context() if self._listener is None else self._listener.context()
            self.call = self.trajectory.enter(self.role, facts, context, 0)
        self.given, hidden = given, given["hidden_states"]
        kinds = Counter({name: len(hidden) * (end - first) for name, first, end in self.call.segments})
        self._size = tuple(hidden.shape), kinds["video"], kinds["text"] + kinds["pad"], hidden.element_size()
        return self.call

    # -- deciding and keeping

    def decide(self, view: View) -> Verdict:
        """Whether the forward under way is computed, and why."""
        call, cache = view.call, self.cache
        why = self._why_apart(call)
        if why is not None:
            return Verdict(call, False, why)
        signature = self._signature(view)
        entry = self.memory.entry(call.branch, signature)
        if entry is not None and call.step == entry.step:
            return Verdict(call, False, "a second forward of the branch in one step")
        if entry is None or call.step - entry.step > 1:
            reason = "the branch's first step" if entry is None else "the branch was away"
            return Verdict(call, False, reason, Entry(signature))
        device = None if self._boundary.lazy else view.x.device
        verdict = Verdict(call, False, "", entry, self.memory.load(entry, device))
        if self._plans is None:
            verdict.expected = cache.judge(view, verdict.memory)
        limited = self._why_limited(call, entry)
        verdict.reason = limited or self._why_judged(verdict)
        if cache.shared and not cache.dry_run and self._plans is None:
            self._share(verdict, bool(limited))
        verdict.reuse = not verdict.reason
        if verdict.reuse and cache.dry_run:
            verdict.reuse, verdict.reason = False, "dry run"
        return verdict

    def _why_apart(self, call: Call) -> str | None:
        """Why this forward is computed and nothing of it kept, or None."""
        if isinstance(self.cache, Off):
            return f"the cache is off for {self.role}"
        steps = self.trajectory.n_steps()
        if steps is not None and steps < self.cache.min_steps:
            return f"fewer than {self.cache.min_steps} steps: too far apart to stand for one another"
        if call.branch is None:
            return "branch unknown"
        module = self._module()
        if torch.is_grad_enabled() and (
            self.given["hidden_states"].requires_grad or any(p.requires_grad for p in module.parameters())
        ):
            return "gradients are needed"
        if parallel.config_of(module) is not None:
            return "context parallelism: processes could decide differently"
        if hasattr(self.adapter, "why_apart"):
            why = self.adapter.why_apart(module, self.given)
            if why is not None:
                return why
        return self._boundary.why_apart(self.given)

    def _why_limited(self, call: Call, entry: Entry) -> str:
        cache = self.cache
        if self._plans is not None:
            plan = self._plans.get(call.branch, self._plans.get(None))
            if plan is None:
                return "a branch that the schedule does not name"
            if call.step >= len(plan):
                return "beyond the schedule's end"
            return "the schedule" if plan[call.step] == "1" else ""
        if entry.computed < cache.warmup:
            return "warm-up"
        if call.noise > cache.compute_above:
            return f"noise level above {cache.compute_above:g}"
        if call.noise < cache.compute_below:
            return f"noise level below {cache.compute_below:g}"
        if cache.max_consecutive is not None and entry.consecutive >= cache.max_consecutive:
            return f"{cache.max_consecutive} steps in a row"
        if cache.max_reused is not None and entry.reused >= cache.max_reused:
            return f"{cache.max_reused} steps of the run"
        return ""

    def _why_judged(self, verdict: Verdict) -> str:
        if self._plans is not None or verdict.expected < self.cache.threshold:
            return ""
        return "nothing to judge by yet" if verdict.expected == NEVER else "above the threshold"

    def _share(self, verdict: Verdict, limited: bool) -> None:
        """The first branch of a step decides for all; another follows it unless it cannot."""
        step = verdict.call.step
        if self._shared is None or self._shared[0] != step:
            self._shared = step, not verdict.reason
        elif not self._shared[1]:
            verdict.reason = verdict.reason or "the step's other branch is computed"
        elif not limited and verdict.expected != NEVER:
            verdict.reason = ""

    def _signature(self, view: View) -> tuple:
        x = view.x
        order = None if self.sparse is None or not self._boundary.keeps_tokens else self.sparse.order
        text = self.given.get("encoder_hidden_states") if self._boundary.keeps_tokens else None
        return tuple(x.shape), x.dtype, x.device, id(order) if order is not None else None, getattr(text, "shape", None)

    @torch.compiler.disable
    def settle(self, verdict: Verdict, view: View, parts: Parts | None) -> None:
        """A step was computed."""
        if verdict.entry is None:
            self.count(verdict.call, False, verdict.reason)
            return
        assert parts is not None
        if self.cache.dry_run and verdict.expected != NEVER:
            self._try(verdict, view, parts)
        self.commit(verdict, view, parts)

    def _try(self, verdict: Verdict, view: View, parts: Parts) -> None:
        call = verdict.call
        whole = self._boundary.compare(view, parts, verdict)
        measure = getattr(self.cache, "measure", None)
        figures = () if measure is None else tuple(measure(parts, verdict.memory).items())
        error = worst(relative_l1(*whole))
        self.trials.append(
            Trial(self.role, call.branch, call.step, call.noise, verdict.expected, error, figures)
        )

    @torch.compiler.disable
    def commit(self, verdict: Verdict, view: View, parts: Parts | None) -> None:
        """Keep what this forward leaves behind. `parts` is None where it was made up."""
        entry, call = dataclasses.replace(verdict.entry), verdict.call
        if parts is None:
            entry.reused, entry.consecutive = entry.reused + 1, entry.consecutive + 1
        else:
            self.cache.learn(view, parts, verdict.memory)
            entry.computed, entry.consecutive = entry.computed + 1, 0
        entry.step, entry.noise = call.step, call.noise
        self.memory.put(call.branch, entry, verdict.memory)
        self.count(call, parts is None, verdict.reason)

    def count(self, call: Call, reused: bool, reason: str) -> None:
        self.tally.note_forward(self.role, reused, reason)
        self.decisions.note(call.branch, call.step, not reused)

    def _begin(self) -> None:
        """A new run, or one that broke off."""
        self.memory.clear()
        self._shared = None
        self.decisions.clear()

    def declare(self, latents: tuple[int, ...], tokens: int, text: int, itemsize: int) -> int:
        """Bytes that one branch's memory will hold.

        Args:
            latents: shape of the output.
            tokens, text: of image or video and of text, in the batch.
            itemsize: bytes of a value.
        """
        config, kept = self._module().config, self.cache.kept()
        width = config.num_attention_heads * config.attention_head_dim if self.cache.boundary == "stack" else 0
        sizes = {
            "latents": torch.Size(latents).numel() * itemsize,
            "hidden": tokens * width * itemsize,
            "text": text * width * itemsize,
            "time": 6 * latents[0] * width * itemsize,
            "figures": 4 * latents[0],  # in fp32
        }
        own = {kind: self._boundary.bytes_of(kind, tokens, text, itemsize) for kind in kept}
        return sum(count * (sizes[kind] if own[kind] is None else own[kind]) for kind, count in kept.items())

    def needs(self) -> tuple[str, int]:
        """What this is called, and the bytes it declares for each branch of forwards like the last; 0 without one."""
        size = 0 if self._size is None or isinstance(self.cache, Off) else self.declare(*self._size)
        return f"step cache {self.cache.name!r} of {self.role}, for each branch", size

    def __repr__(self) -> str:
        return f"CacheEngine({self.role}, {self.cache!r}, {self.memory!r})"

    def __deepcopy__(self, memo: dict) -> CacheEngine:
        raise UsageError(
            "A transformer with a step cache cannot be copied: diffusers' hooks of the copy would run the original. "
            "Call the handle's remove() first, and install again."
        )


def remove_cache(transformer: nn.Module) -> None:
    """Remove the step cache that is there, if one is."""
    registry = getattr(transformer, "_diffusers_hook", None)
    hook = None if registry is None else registry.hooks.get(walk.ROOT)
    if hook is not None:
        hook.engine.remove()
