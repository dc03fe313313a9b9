"""CacheEngine: one transformer wired for a step cache, which its `Decider` part decides about."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.adapters import arguments_of, find_adapter, parallel
from dit_accel.caches import walk
from dit_accel.caches.boundaries import make_boundary
from dit_accel.caches.cache import Cache, Parts, View
from dit_accel.caches.decider import Decider, Verdict
from dit_accel.caches.memory import Entry
from dit_accel.caches.off import Off
from dit_accel.errors import UsageError
from dit_accel.hooks import Listener
from dit_accel.report import Tally
from dit_accel.trajectory import Call, Context, Trajectory

if TYPE_CHECKING:
    from dit_accel.caches.boundaries.boundary import Hooked
    from dit_accel.engine import Engine

LISTENER = "dit_accel_cache_context"


class CacheEngine(Decider):
    """A step cache on one transformer of diffusers. It takes over from one that is there.

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
        super().__init__(cache, trajectory, tally, role)
        self.sparse = sparse
        self.given: dict[str, Any] | None = None  # arguments of the forward under way
        self.call: Call | None = None
        self._boundary = make_boundary(self)
        self._module = weakref.ref(transformer)
        self._names = tuple(inspect.signature(inspect.unwrap(type(transformer).forward)).parameters)[1:]
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
        trajectory.on_new_run(self.begin)

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
            self.begin()  # what was learnt may be of a forward that went wrong
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

    # -- what diffusers adds to the decision

    def _why_apart(self, call: Call) -> str | None:
        why = super()._why_apart(call)
        if why is not None:
            return why
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

    def _signature(self, view: View) -> tuple:
        order = None if self.sparse is None or not self._boundary.keeps_tokens else self.sparse.order
        text = self.given.get("encoder_hidden_states") if self._boundary.keeps_tokens else None
        own = id(order) if order is not None else None, getattr(text, "shape", None)
        return (*super()._signature(view), *own)

    def _load(self, entry: Entry, view: View) -> dict[str, Any]:
        return self.memory.load(entry, None) if self._boundary.lazy else super()._load(entry, view)

    def _compare(self, view: View, parts: Parts, verdict: Verdict) -> tuple[Tensor, Tensor]:
        return self._boundary.compare(view, parts, verdict)

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
