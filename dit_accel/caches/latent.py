"""latent: easy's gate, and an output held or continued over the noise level.

The velocity that a flow model predicts changes slowly with the noise level along a sampling path; the offset of
EasyCache (`v - x` held constant) has no such reason. A polynomial through the latest computed outputs costs as little:
order 0 holds the velocity, higher orders continue it. Guidance multiplies what they get wrong where the velocity still
changes fast, so that the default is to hold. `dry_run` notes the error that each reuse would have made: try the orders
on a model of your own.

A velocity's error counts by how far the solver goes with it and by what the model makes of it later: `weights` says how
much at which noise level, and the threshold is for the product. Few steps of a shifted schedule go half of the way.
`dit-accel tune` measures them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from dit_accel.caches import easy
from dit_accel.caches.cache import NEVER, Parts, View, check_order, need, number, place_of


@dataclass(frozen=True)
class Cache(easy.Cache):
    """As `easy`, with another predictor."""

    order: int = 0  # of the polynomial, 0 to 2; the highest that as many computed steps allow
    over: str = "noise"  # what it is a polynomial of: the "noise" level, or the number of the "step"
    # (noise level, how much an error counts there), in proportion between two; none: as much everywhere
    weights: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order, self.over)
        object.__setattr__(self, "weights", check_weights(self.weights))

    def judge(self, view: View, memory: dict[str, Any]) -> float:
        return super().judge(view, memory) * weight_at(self.weights, view.call.noise)

    def fill(self, view: View, memory: dict[str, Any]) -> Parts:
        from dit_accel.caches.parts.extrapolate import extrapolate

        return extrapolate(memory["outputs"], place_of(view.call, self.over), self.order), None

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        super().learn(view, parts, memory)
        place = place_of(view.call, self.over)
        memory["outputs"] = (*memory.get("outputs", ()), (place, parts[0]))[-(self.order + 1) :]

    def kept(self) -> dict[str, int]:
        return {"latents": 3 + self.order, "figures": 2}


def check_weights(given: Any) -> tuple[tuple[float, float], ...]:
    """Pairs of noise level and weight, levels rising.

    Raises:
        UsageError: anything else.
    """
    pairs = isinstance(given, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(number, pair)) for pair in given
    )
    legal = pairs and all(0 <= level <= 1 and 0 < weight < NEVER for level, weight in given)
    legal = legal and len({level for level, _ in given}) == len(given)
    need(legal, "weights", given, "pairs [noise level from 0 to 1, weight above 0], each level once")
    return tuple(sorted((float(level), float(weight)) for level, weight in given))


def weight_at(weights: tuple[tuple[float, float], ...], noise: float) -> float:
    """How much an error counts at a noise level: beyond the first and last pair as much as there."""
    if not weights:
        return 1.0
    place = bisect_left([level for level, _ in weights], noise)
    if place in (0, len(weights)):
        return weights[min(place, len(weights) - 1)][1]
    (low, before), (high, behind) = weights[place - 1 : place + 1]
    return before + (behind - before) * (noise - low) / (high - low)
