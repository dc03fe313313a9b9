"""Results: presets that were really run, and what came of a tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel.preset import Preset
from dit_accel.tuning.problem import Allocation, Problem
from dit_accel.tuning.runs import Likeness, Made
from dit_accel.tuning.ways import Way


@dataclass(frozen=True)
class Tried:
    """A preset that was really run on every held-out clip."""

    name: str
    preset: Preset
    cost: float  # computed time as a share of dense
    likeness: tuple[Likeness, ...]
    reports: tuple[dict[str, Any] | None, ...]
    schedules: tuple[str | None, ...] = ()  # of each clip, a digit a step, 1 for a computed one; None: all were

    def figure(self, kind: str) -> float:
        """What a budget of this kind bounds: the computed time, or a mean over clips."""
        if kind == "time":
            return self.cost
        return float(np.mean([getattr(one, kind) for one in self.likeness]))

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"name": self.name, "computed_time": round(self.cost, 4)}
        for kind in ("psnr", "ssim", "time", "seconds", "error"):
            values = [getattr(one, kind) for one in self.likeness]
            if all(value is not None for value in values):
                told[kind] = round(float(np.mean(values)), 4)
                told[f"{kind}_of_clips"] = [round(value, 4) for value in values]
        told["worst_psnr"] = round(min(one.psnr for one in self.likeness), 4)
        told["options"] = {
            key: part.to_mapping() if (part := getattr(self.preset, key)) else None for key in ("sparse", "cache")
        }
        told["steps"] = self.preset.generate.steps
        return {**told, "schedules": list(self.schedules), "reports": list(self.reports)}


@dataclass(frozen=True)
class Entrant:
    """A way that was really run on the clips tuned on."""

    way: Way
    problem: Problem  # by which it was shared out
    allocation: Allocation
    cost: float  # computed time as a share of dense
    psnr: float  # dB, mean over clips
    predicted: float  # dB
    schedules: tuple[tuple[bool, ...], ...] = ()  # which steps were computed of each clip
    corrected: bool = False  # shared out by how large errors turned out
    polished: bool = False  # the best of several such runs

    def __str__(self) -> str:
        told = {"corrected": self.corrected, "polished": self.polished}
        return ", ".join([str(self.way), *(word for word, does in told.items() if does)])

    def to_dict(self) -> dict[str, Any]:
        told = {"computed_time": self.cost, "psnr": self.psnr, "predicted_psnr": self.predicted}
        return {"way": str(self), "method": self.way.method, **{key: round(x, 4) for key, x in told.items()}}


@dataclass(frozen=True)
class Carried:
    """A way to carry block plans over that was really run on the clips tuned on."""

    options: Mapping[str, Any]  # `share_plans`, `predict_every`; of the sparse attention
    cost: float  # computed time as a share of dense; what is saved of predicting is not counted
    psnr: float  # dB, mean over clips
    taken: bool

    def to_dict(self) -> dict[str, Any]:
        told = {"computed_time": round(self.cost, 4), "psnr": round(self.psnr, 4)}
        return {"options": dict(self.options), **told, "taken": self.taken}


@dataclass(frozen=True)
class Tuned:
    """What came of it."""

    tables: dict[str, Any]  # of the preset
    allocation: Allocation
    way: str  # what kind of preset it is
    chosen: Tried
    tries: tuple[Tried, ...]
    entrants: tuple[Entrant, ...]  # the ways to choose from; none where there was no choice
    carried: tuple[Carried, ...]  # ways to carry plans over; none where attention is dense
    predicted: dict[str, float]  # of the chosen one: psnr, time, error
    rivals: tuple[Tried, ...]
    additivity: tuple[float, ...]
    forward_share: float
    dense: tuple[Made, ...]
