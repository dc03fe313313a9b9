"""EasyCache: the change of the input, times how strongly the output last answered to such a change.

Source: arXiv 2507.02860. Whole steps are made up in latent space, where a memory is some fortieth of one of hidden
states: `v_i = x_i + (v_j - x_j)`, j the step computed last. The published code fixes the first ten steps by hand and
counts calls to tell branches apart; here the warm-up is an option and branches have names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel.caches import cache as base
from dit_accel.caches.cache import NEVER, Parts, View


@dataclass(frozen=True)
class Cache(base.StepCache):
    """One branch decides for all, each makes its own output up."""

    shared: ClassVar[bool] = True

    threshold: float = 0.05  # the accumulated change of the output that is let pass, relative; published for Wan 2.1
    warmup: int = 2  # the rate is known once two steps are computed

    def judge(self, view: View, memory: dict[str, Any]) -> float:
        from dit_accel.caches.parts.measures import TINY, mean_size, worst

        before, memory["x"] = memory["x"], view.x
        if "rate" not in memory:
            return NEVER
        _, output = memory["computed"]
        change = memory["rate"] * mean_size(view.x - before) / mean_size(output).clamp_min(TINY)
        memory["error"] = memory["error"] + change
        return worst(memory["error"])

    def fill(self, view: View, memory: dict[str, Any]) -> Parts:
        x, output = memory["computed"]
        return view.x + (output - x), None

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        from dit_accel.caches.parts.measures import TINY, mean_size

        if "computed" in memory:
            x, output = memory["computed"]
            memory["rate"] = mean_size(parts[0] - output) / mean_size(view.x - x).clamp_min(TINY)
        memory["x"], memory["computed"] = view.x, (view.x, parts[0])
        memory["error"] = mean_size(parts[0]) * 0

    def kept(self) -> dict[str, int]:
        return {"latents": 3, "figures": 2}
