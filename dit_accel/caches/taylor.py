"""TaylorSeer at stack level: every few steps are computed, those between continue what the blocks added.

Source: arXiv 2503.06923. Two things differ. One tensor is kept, what the whole stack adds, where the paper keeps
factors for every attention and MLP (346 GiB for Wan 14B at 720p). And it is continued over the noise level, where the
paper has the number of the step (`over`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel.caches import cache as base
from dit_accel.caches.cache import Parts, View, check_order, need, place_of, whole


@dataclass(frozen=True)
class Cache(base.StepCache):
    """All blocks, a fixed interval, a polynomial."""

    boundary: ClassVar[str] = "stack"

    threshold: float = 1.0  # of the share of an interval that is over
    warmup: int = 3  # published for FLUX.1
    interval: int = 4  # one step of so many is computed
    order: int = 1
    over: str = "noise"  # what the polynomial is one of: the "noise" level, or the number of the "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        need(whole(self.interval) and self.interval >= 1, "interval", self.interval, "a whole number from 1 on")
        check_order(self.order, self.over)

    def judge(self, view: View, memory: dict[str, Any]) -> float:
        memory["since"] += 1
        return memory["since"] / self.interval

    def fill(self, view: View, memory: dict[str, Any]) -> Parts:
        from dit_accel.caches.parts.extrapolate import extrapolate_parts

        return extrapolate_parts(memory["seen"], place_of(view.call, self.over), self.order)

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        memory["seen"] = (*memory.get("seen", ()), (place_of(view.call, self.over), parts))[-(self.order + 1) :]
        memory["since"] = 0

    def kept(self) -> dict[str, int]:
        return {"hidden": self.order + 1, "text": self.order + 1}
