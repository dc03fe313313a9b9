"""Boundary "stack": the blocks, but for some at either end that are always computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.caches import walk
from dit_accel.caches.boundaries.boundary import Boundary, Hooked
from dit_accel.caches.cache import Parts, View
from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from dit_accel.caches.decider import Verdict
    from dit_accel.caches.engine import CacheEngine
    from dit_accel.trajectory import Call


class StackBoundary(Boundary):
    """It decides at the gate, in front of the first block that may be left out."""

    def __init__(self, engine: CacheEngine) -> None:
        super().__init__(engine)
        self._end = 0  # the first block behind those that may be left out
        self.clear()

    def clear(self) -> None:
        self._gate: View | None = None
        self._before: Tensor | None = None  # tokens in front of the first block
        self._text: Tensor | None = None  # at the gate
        self._verdict: Verdict | None = None
        self._parts: Parts | None = None

    def hooks(self, transformer: nn.Module) -> list[Hooked]:
        cache = self.engine.cache
        blocks = walk.blocks_of(transformer)
        forms = walk.forms_of(blocks)
        if cache.head + cache.tail >= len(blocks):
            raise UsageError(
                f"cache {cache.name!r} computes {cache.head} + {cache.tail} blocks at every step, "
                f"and this transformer has {len(blocks)}: leave at least one to be made up."
            )
        self._end = len(blocks) - cache.tail
        pairs = enumerate(zip(blocks, forms, strict=True))
        return [(block, walk.BlockHook(self, index, form)) for index, (block, form) in pairs]

    def why_apart(self, given: dict[str, Any]) -> str | None:
        for name, value in given.items():
            if "control" in name and value is not None and name != "control_hidden_states_scale":
                return f"{name}: it is added between the blocks"
        return None

    def run(self, call: Call, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        output = original(*args, **kwargs)
        self._leave(call)
        return output

    def pass_block(
        self, hook: walk.BlockHook, block: nn.Module, original: Callable[[], Any], given: dict[str, Any]
    ) -> Any:
        """One block of the stack: computed, or passed by."""
        if self.engine.call is None:
            return original()
        first = self.engine.cache.head
        hidden, text = hook.form.read(given)
        if hook.index == 0:
            self._before = hidden
        if hook.index == first:
            self._open_gate(hidden, text, block, given)
        verdict = self._verdict
        if verdict is not None and verdict.reuse and first <= hook.index < self._end:
            if hook.index == first:
                more, more_text = self._fill()
                hidden = hidden + more
                text = text if more_text is None else text + more_text
            return hook.form.join(hidden, text)
        output = original()
        if hook.index == self._end - 1 and verdict is not None and verdict.entry is not None:
            self._close_gate(*hook.form.split(output))
        return output

    @torch.compiler.disable
    def _open_gate(self, hidden: Tensor, text: Tensor | None, block: nn.Module, given: dict[str, Any]) -> None:
        lead = hidden - self._before if self.engine.cache.head and self._before is not None else None
        self._gate, self._text = View(self.engine.call, hidden, lead, block, given), text
        self._verdict = self.engine.decide(self._gate)

    @torch.compiler.disable
    def _fill(self) -> Parts:
        more, more_text = self.engine.cache.fill(self._gate, self._verdict.memory)
        return more.to(self._gate.x.dtype), more_text

    @torch.compiler.disable
    def _close_gate(self, hidden: Tensor, text: Tensor | None) -> None:
        both = text is not None and self._text is not None
        self._parts = (hidden - self._gate.x).detach(), (text - self._text).detach() if both else None

    @torch.compiler.disable
    def _leave(self, call: Call) -> None:
        """The forward returned: what it leaves is kept."""
        engine, verdict = self.engine, self._verdict
        if verdict is None:
            engine.count(call, False, "its first blocks were left out")
        elif verdict.reuse:
            engine.commit(verdict, self._gate, None)
        elif verdict.entry is None or self._parts is not None:
            engine.settle(verdict, self._gate, self._parts)
        else:
            engine.count(call, False, "its last blocks were left out")

    def compare(self, view: View, parts: Parts, verdict: Verdict) -> tuple[Tensor, Tensor]:
        return view.x + self.engine.cache.fill(view, verdict.memory)[0], view.x + parts[0]
