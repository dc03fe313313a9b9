"""MagCache: how the size of what the blocks add changes from step to step is nearly the same for every prompt.

Source: arXiv 2506.09045. `ratios[i]` is the mean over tokens of `|r_i| / |r_{i-1}|`, measured once with `dry_run` (its
figure "ratio"; `ratios_of`). A reused residual is off by the product of the ratios since it was computed; its distance
from one is added up over the steps made up, and the sum is held against the threshold. The schedule follows from the
ratios alone. Published (threshold, in a row, first part computed): Wan 2.1 .12/2/.2, HunyuanVideo .24/6/.2, FLUX.1
.24/5/.1. Ratios for other numbers of steps are taken from the nearest place of the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel.caches import cache as base
from dit_accel.caches.cache import NEVER, Parts, View, need, number
from dit_accel.caches.trials import Trial
from dit_accel.errors import UsageError


@dataclass(frozen=True)
class Cache(base.StepCache):
    """All blocks, a table of ratios, what was added is held."""

    boundary: ClassVar[str] = "stack"

    threshold: float = 0.12
    max_consecutive: int | None = 2
    ratios: tuple[float, ...] = ()  # by step, from a dry run; the first is of no meaning
    steps: int | None = None  # steps of the runs to come, where they differ from the ratios'

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ratios", tuple(self.ratios))
        legal = all(number(ratio) and ratio > 0 for ratio in self.ratios)
        need(legal, "ratios", self.ratios, "numbers above 0, one a step")
        if not self.ratios and not self.dry_run and self.schedule is None:
            raise UsageError(
                "cache 'mag' needs ratios of the model: measure them with dry_run=true, then give `ratios_of(trials)`."
            )

    def judge(self, view: View, memory: dict[str, Any]) -> float:
        memory["product"] *= self._ratio(view.call.step)
        memory["error"] += abs(1 - memory["product"])
        return memory["error"]

    def fill(self, view: View, memory: dict[str, Any]) -> Parts:
        return memory["added"]

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        memory["added"], memory["product"], memory["error"] = parts, 1.0, 0.0

    def measure(self, parts: Parts, memory: dict[str, Any]) -> dict[str, float]:
        """The ratio of this step, for a dry run."""
        now, before = (x.float().norm(dim=-1) for x in (parts[0], memory["added"][0]))
        return {"ratio": float((now / before.clamp_min(1e-12)).mean())}

    def kept(self) -> dict[str, int]:
        return {"hidden": 1, "text": 1}

    def _ratio(self, step: int) -> float:
        if not self.ratios:
            return 1.0
        if self.steps is not None:
            step = round(step * (len(self.ratios) - 1) / max(self.steps - 1, 1))
        return self.ratios[step] if step < len(self.ratios) else NEVER


def ratios_of(trials: Iterable[Trial], role: str = "transformer") -> tuple[float, ...]:
    """The ratios that a dry run measured: by step, the mean over branches; 1 for steps it could not measure."""
    found: dict[int, list[float]] = {}
    for trial in trials:
        if trial.role == role and "ratio" in dict(trial.figures):
            found.setdefault(trial.step, []).append(dict(trial.figures)["ratio"])
    if not found:
        raise UsageError("These trials hold no ratios: they must come from a dry run of cache 'mag'.")
    return tuple(sum(found[i]) / len(found[i]) if i in found else 1.0 for i in range(max(found) + 1))
