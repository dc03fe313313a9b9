"""latent: easy's gate, and an output continued over the noise level.

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
from dit_accel.caches.cache import Parts, View, need


@dataclass(frozen=True)
class Cache(easy.Cache):
    """As `easy`, with another predictor."""

    order: int = 0  # of the polynomial, 0 to 2; the highest that as many computed steps allow

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.order in (0, 1, 2), "order", self.order, "0, 1 or 2")

    def fill(self, view: View, memory: dict[str, Any]) -> Parts:
        from dit_accel.caches.parts.extrapolate import extrapolate

        return extrapolate(memory["outputs"], view.call.noise, self.order), None

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        super().learn(view, parts, memory)
        memory["outputs"] = (*memory.get("outputs", ()), (view.call.noise, parts[0]))[-(self.order + 1) :]

    def kept(self) -> dict[str, int]:
        return {"latents": 3 + self.order, "figures": 2}
