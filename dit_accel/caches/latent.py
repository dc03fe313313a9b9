"""latent: easy's gate, and an output held or continued over the noise level.

The velocity that a flow model predicts changes slowly with the noise level along a sampling path; the offset of
EasyCache (`v - x` held constant) has no such reason. A polynomial through the latest computed outputs costs as little:
order 0 holds the velocity, higher orders continue it. Guidance multiplies what they get wrong where the velocity still
changes fast, so that the default is to hold. `dry_run` notes the error that each reuse would have made: try the orders
on a model of your own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_accel.caches import easy
from dit_accel.caches.cache import Parts, View, check_order, place_of


@dataclass(frozen=True)
class Cache(easy.Cache):
    """As `easy`, with another predictor."""

    order: int = 0  # of the polynomial, 0 to 2; the highest that as many computed steps allow
    over: str = "noise"  # what it is a polynomial of: the "noise" level, or the number of the "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order, self.over)

    def fill(self, view: View, memory: dict[str, Any]) -> Parts:
        from dit_accel.caches.parts.extrapolate import extrapolate

        return extrapolate(memory["outputs"], place_of(view.call, self.over), self.order), None

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        super().learn(view, parts, memory)
        place = place_of(view.call, self.over)
        memory["outputs"] = (*memory.get("outputs", ()), (place, parts[0]))[-(self.order + 1) :]

    def kept(self) -> dict[str, int]:
        return {"latents": 3 + self.order, "figures": 2}
