"""CacheEngine: one transformer wired for a step cache. It decides, keeps, makes up, and counts."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.adapters import arguments_of, find_adapter, parallel
from dit_accel.caches import walk
from dit_accel.caches.cache import NEVER, Cache, Parts, View
from dit_accel.caches.memory import Entry, Memory
from dit_accel.caches.parts.measures import relative_l1, worst
from dit_accel.caches.trials import Trial
from dit_accel.errors import UsageError
from dit_accel.hooks import Listener
from dit_accel.report import Tally
from dit_accel.trajectory import Call, Context, Trajectory

if TYPE_CHECKING:
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
        cache: what is kept, and when it serves.
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
        self.decisions: list[bool] = []  # by step: whether any branch of the latest run computed it
        self._memory = Memory(cache.store_device)
        self._module = weakref.ref(transformer)
        self._names = tuple(inspect.signature(inspect.unwrap(type(transformer).forward)).parameters)[1:]
        self._shared: tuple[int, bool] | None = None  # what the first branch of a step decided
        self._rows_apart = getattr(self.adapter, "ROWS_APART", False)
        self._given: dict[str, Any] | None = None  # arguments of the forward under way
        self._call: Call | None = None
        self._gate: View | None = None
        self._before: Tensor | None = None  # tokens in front of the first block
        self._text: Tensor | None = None  # at the gate
        self._verdict: Verdict | None = None
        self._parts: Parts | None = None
        self._listener: Listener | None = None
        self._removers: list[Callable[[], None]] = []
        self._wire(transformer)
        trajectory.on_new_run(self._begin)

    # -- installing and removing

    def _wire(self, transformer: nn.Module) -> None:
        blocks: list[nn.Module] = []
        forms: list[walk.Form] = []
        if self.cache.boundary == "stack":
            blocks = walk.blocks_of(transformer)
            forms = walk.forms_of(blocks)
            if self.cache.head + self.cache.tail >= len(blocks):
                raise UsageError(
                    f"cache {self.cache.name!r} computes {self.cache.head} + {self.cache.tail} blocks at every step, "
                    f"and this transformer has {len(blocks)}: leave at least one to be made up."
                )
        self._end = len(blocks) - self.cache.tail
        remove_cache(transformer)
        try:
            for index, (block, form) in enumerate(zip(blocks, forms, strict=True)):
                self._removers.append(walk.set_hook(block, walk.BlockHook(self, index, form), walk.BLOCK))
            self._removers.append(walk.set_hook(transformer, walk.RootHook(self), walk.ROOT))
        except BaseException:
            self.remove()
            raise
        if self.sparse is None:
            self._listener = Listener(self.trajectory, LISTENER)
            self._listener.join(transformer)
        transformer._diffusers_hook.invalidate_child_registries_cache()

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
        self._memory.clear()
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            registry.invalidate_child_registries_cache()

    @property
    def installed(self) -> bool:
        return bool(self._removers)

    def bytes_held(self) -> int:
        """Memory kept between forwards."""
        return self._memory.bytes_held()

    # -- one forward

    def run(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The transformer's forward: computed, or made up."""
        call = self._enter(args, kwargs)
        if call is None:
            return original(*args, **kwargs)
        try:
            if self.cache.boundary == "stack":
                output = original(*args, **kwargs)
                self._leave_stack()
            else:
                output = self._run_whole(call, original, args, kwargs)
        except BaseException:
            self._begin()  # what was learnt may be of a forward that went wrong
            raise
        finally:
            self._given = self._call = self._gate = self._verdict = self._parts = self._before = self._text = None
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
            self._call = self.sparse.call
        else:
            facts = self.adapter.read(self._module(), given)
            context = Context() if self._listener is None else self._listener.context()
            self._call = self.trajectory.enter(self.role, facts, context, 0)
        self._given = given
        return self._call

    def _run_whole(self, call: Call, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        verdict, view = self._decide_whole(call)
        if verdict.reuse:
            made = self._made_up(view, verdict)
            self._commit(verdict, view, None)
            sample = list(made.unbind()) if self._rows_apart else made
            return (sample,) if not self._given.get("return_dict", True) else _as_output(sample)
        output = original(*args, **kwargs)
        sample = output[0]
        if self._rows_apart and verdict.entry is not None:
            sample = torch.stack(sample)
        self._settle(verdict, view, (sample.detach().clone(), None) if verdict.entry is not None else None)
        return output

    @torch.compiler.disable
    def _decide_whole(self, call: Call) -> tuple[Verdict, View]:
        view = View(call, _latents(self._module(), self._given["hidden_states"]))
        verdict = self._decide(view)
        if self.sparse is not None and self.sparse.installed:
            self.sparse.skip() if verdict.reuse else self.sparse.begin()
        return verdict, view

    @torch.compiler.disable
    def _made_up(self, view: View, verdict: Verdict) -> Tensor:
        return self.cache.fill(view, verdict.memory)[0].to(view.x.dtype)

    def pass_block(
        self, hook: walk.BlockHook, block: nn.Module, original: Callable[[], Any], given: dict[str, Any]
    ) -> Any:
        """One block of the stack: computed, or passed by."""
        if self._call is None:
            return original()
        first = self.cache.head
        hidden, text = hook.form.read(given)
        if hook.index == 0:
            self._before = hidden
        if hook.index == first:
            self._open_gate(hidden, text, block, given)
        verdict = self._verdict
        if verdict is not None and verdict.reuse and first <= hook.index < self._end:
            if hook.index == first:
                more, more_text = self._fill_stack()
                hidden = hidden + more
                text = text if more_text is None else text + more_text
            return hook.form.join(hidden, text)
        output = original()
        if hook.index == self._end - 1 and verdict is not None and verdict.entry is not None:
            self._close_gate(*hook.form.split(output))
        return output

    @torch.compiler.disable
    def _open_gate(self, hidden: Tensor, text: Tensor | None, block: nn.Module, given: dict[str, Any]) -> None:
        lead = hidden - self._before if self.cache.head and self._before is not None else None
        self._gate, self._text = View(self._call, hidden, lead, block, given), text
        self._verdict = self._decide(self._gate)

    @torch.compiler.disable
    def _fill_stack(self) -> Parts:
        more, more_text = self.cache.fill(self._gate, self._verdict.memory)
        return more.to(self._gate.x.dtype), more_text

    @torch.compiler.disable
    def _close_gate(self, hidden: Tensor, text: Tensor | None) -> None:
        both = text is not None and self._text is not None
        self._parts = (hidden - self._gate.x).detach(), (text - self._text).detach() if both else None

    @torch.compiler.disable
    def _leave_stack(self) -> None:
        """The forward returned: what it leaves is kept."""
        verdict = self._verdict
        if verdict is None:
            self._count(self._call, False, "its first blocks were left out")
        elif verdict.reuse:
            self._commit(verdict, self._gate, None)
        elif verdict.entry is None or self._parts is not None:
            self._settle(verdict, self._gate, self._parts)
        else:
            self._count(self._call, False, "its last blocks were left out")

    # -- deciding and keeping

    def _decide(self, view: View) -> Verdict:
        call, cache = view.call, self.cache
        why = self._why_apart(call)
        if why is not None:
            return Verdict(call, False, why)
        signature = self._signature(view)
        entry = self._memory.entry(call.branch, signature)
        if entry is not None and call.step == entry.step:
            return Verdict(call, False, "a second forward of the branch in one step")
        if entry is None or call.step - entry.step > 1:
            reason = "the branch's first step" if entry is None else "the branch was away"
            return Verdict(call, False, reason, Entry(signature))
        verdict = Verdict(call, False, "", entry, self._memory.load(entry, view.x.device))
        if cache.schedule is None:
            verdict.expected = cache.judge(view, verdict.memory)
        limited = self._why_limited(call, entry)
        verdict.reason = limited or self._why_judged(verdict)
        if cache.shared and not cache.dry_run and cache.schedule is None:
            self._share(verdict, bool(limited))
        verdict.reuse = not verdict.reason
        if verdict.reuse and cache.dry_run:
            verdict.reuse, verdict.reason = False, "dry run"
        return verdict

    def _why_apart(self, call: Call) -> str | None:
        """Why this forward is computed and nothing of it kept, or None."""
        steps = self.trajectory.n_steps()
        if steps is not None and steps < self.cache.min_steps:
            return f"fewer than {self.cache.min_steps} steps: too far apart to stand for one another"
        if call.branch is None:
            return "branch unknown"
        module = self._module()
        if torch.is_grad_enabled() and (
            self._given["hidden_states"].requires_grad or any(p.requires_grad for p in module.parameters())
        ):
            return "gradients are needed"
        if parallel.config_of(module) is not None:
            return "context parallelism: processes could decide differently"
        if hasattr(self.adapter, "why_apart"):
            why = self.adapter.why_apart(module, self._given)
            if why is not None:
                return why
        if self.cache.boundary == "stack":
            for name, value in self._given.items():
                if "control" in name and value is not None and name != "control_hidden_states_scale":
                    return f"{name}: it is added between the blocks"
        return None

    def _why_limited(self, call: Call, entry: Entry) -> str:
        cache = self.cache
        if cache.schedule is not None:
            if call.step >= len(cache.schedule):
                return "beyond the schedule's end"
            return "the schedule" if cache.schedule[call.step] == "1" else ""
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
        if self.cache.schedule is not None or verdict.expected < self.cache.threshold:
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
        order = None if self.sparse is None or self.cache.boundary == "call" else self.sparse.order
        return tuple(x.shape), x.dtype, x.device, id(order) if order is not None else None

    @torch.compiler.disable
    def _settle(self, verdict: Verdict, view: View, parts: Parts | None) -> None:
        """A step was computed."""
        if verdict.entry is None:
            self._count(verdict.call, False, verdict.reason)
            return
        assert parts is not None
        if self.cache.dry_run and verdict.expected != NEVER:
            self._try(verdict, view, parts)
        self._commit(verdict, view, parts)

    def _try(self, verdict: Verdict, view: View, parts: Parts) -> None:
        call = verdict.call
        guess = self.cache.fill(view, verdict.memory)[0]
        whole = (view.x + guess, view.x + parts[0]) if self.cache.boundary == "stack" else (guess, parts[0])
        measure = getattr(self.cache, "measure", None)
        figures = () if measure is None else tuple(measure(parts, verdict.memory).items())
        error = worst(relative_l1(*whole))
        self.trials.append(
            Trial(self.role, call.branch, call.step, call.noise, verdict.expected, error, figures)
        )

    @torch.compiler.disable
    def _commit(self, verdict: Verdict, view: View, parts: Parts | None) -> None:
        """Keep what this forward leaves behind. `parts` is None where it was made up."""
        entry, call = dataclasses.replace(verdict.entry), verdict.call
        if parts is None:
            entry.reused, entry.consecutive = entry.reused + 1, entry.consecutive + 1
        else:
            self.cache.learn(view, parts, verdict.memory)
            entry.computed, entry.consecutive = entry.computed + 1, 0
        entry.step, entry.noise = call.step, call.noise
        self._memory.put(call.branch, entry, verdict.memory)
        self._count(call, parts is None, verdict.reason)

    def _count(self, call: Call, reused: bool, reason: str) -> None:
        self.tally.note_forward(reused, reason)
        while len(self.decisions) <= call.step:
            self.decisions.append(False)
        self.decisions[call.step] |= not reused

    def _begin(self) -> None:
        """A new run, or one that broke off."""
        self._memory.clear()
        self._shared = None
        self.decisions = []

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
        return sum(count * sizes[kind] for kind, count in kept.items())

    def __repr__(self) -> str:
        return f"CacheEngine({self.role}, {self.cache!r}, {self._memory!r})"

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


def _latents(transformer: nn.Module, hidden: Tensor) -> Tensor:
    """What of a transformer's input is in its output's shape: without channels of a picture or mask that condition it.

    The copy is the cache's own.
    """
    config = transformer.config
    channels = getattr(config, "out_channels", None) or config.in_channels
    hidden = hidden.detach()
    return (hidden[:, :channels] if hidden.dim() > 3 else hidden[..., :channels]).clone()


def _as_output(sample: Tensor) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)
