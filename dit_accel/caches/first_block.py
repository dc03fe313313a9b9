"""First-block cache: what the first block adds tells whether the others may be left out.

Source: ParaAttention, diffusers' FirstBlockCache. The first block runs at every step; where what it adds differs from
what it added at the step *computed last* by less than the threshold (relative L1, the worst of the batch), the other
blocks add what they added then. Published thresholds for FLUX.1 dev: .06 to .12. diffusers' own knows neither warm-up
nor limits, keeps state of requests that broke off, and does not tell another size or batch.

`order` continues what the others added instead of holding it; over the number of the step, this is what cache-dit's
TaylorSeer calibrator does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel.caches import cache as base
from dit_accel.caches.cache import NEVER, Parts, View, check_order, place_of


@dataclass(frozen=True)
class Cache(base.StepCache):
    """Stack without its first block, relative L1 against the step computed last, what was added held or continued."""

    boundary: ClassVar[str] = "stack"
    head: ClassVar[int] = 1

    threshold: float = 0.08
    order: int = 0  # of the polynomial that continues what was added; 0 holds it
    over: str = "noise"  # what it is a polynomial of: the "noise" level, or the number of the "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order, self.over)

    def judge(self, view: View, memory: dict[str, Any]) -> float:
        from dit_accel.caches.parts.measures import relative_l1, worst

        if view.lead is None:
            return NEVER
        return worst(relative_l1(view.lead, memory["lead"]))

    def fill(self, view: View, memory: dict[str, Any]) -> Parts:
        from dit_accel.caches.parts.extrapolate import extrapolate_parts

        return extrapolate_parts(memory["seen"], place_of(view.call, self.over), self.order)

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        memory["lead"] = view.lead
        memory["seen"] = (*memory.get("seen", ()), (place_of(view.call, self.over), parts))[-(self.order + 1) :]

    def kept(self) -> dict[str, int]:
        return {"hidden": 2 + self.order, "text": 1 + self.order}
