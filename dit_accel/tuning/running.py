"""Running: an allocation as a preset, and its clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dit_accel.preset import Preset
from dit_accel.quality.metrics import psnr
from dit_accel.tuning.as_preset import load, tables_of, to_toml
from dit_accel.tuning.matching import Matched, match_time
from dit_accel.tuning.measuring import Measured
from dit_accel.tuning.plan import Plan
from dit_accel.tuning.problem import Allocation, Problem, bucket_steps
from dit_accel.tuning.runs import Clip, Made, Maker


@dataclass(frozen=True)
class Runner:
    """Runs allocations of one plan for real."""

    name: str  # of the preset to be
    plan: Plan
    maker: Maker
    measured: Measured

    def carrying(self, method: int, options: Mapping[str, Any]) -> Runner:
        """One whose presets carry plans over."""
        return replace(self, plan=self.plan.carrying(method, options))

    def tables(self, allocation: Allocation, method: int) -> dict[str, Any]:
        """The tables of an allocation's preset, claims left out."""
        plan, noise = self.plan, self.measured.samples[method][0].noise
        bucket = bucket_steps(len(noise), plan.buckets)
        return tables_of(plan.base, plan.methods[method], allocation, plan.keeps, noise, bucket)

    def preset(self, allocation: Allocation, method: int) -> Preset:
        """An allocation as a preset."""
        return load(to_toml(self.name, self.tables(allocation, method)), self.name, "tune")

    def run(self, problem: Problem, method: int, allocation: Allocation, clips: Sequence[Clip]) -> Matched:
        """Clips as an allocation has them, and what they took."""
        preset = self.preset(allocation, method)
        made = tuple(self.maker.make(preset, clip) for clip in clips)
        return Matched(preset, _cost(problem, allocation, made), made, allocation.threshold)

    def match(self, problem: Problem, method: int, allocation: Allocation, time: float) -> Matched:
        """The clips tuned on, with an allocation's threshold moved until they take no more than a time."""

        def run(threshold: float | None) -> Matched:
            return self.run(problem, method, replace(allocation, threshold=threshold), self.plan.clips)

        return match_time(run, allocation.threshold, time, at_least=False)


def likeness(matched: Matched, dense: Sequence[np.ndarray]) -> float:
    """Mean PSNR in dB against dense frames."""
    return float(np.mean([psnr(one.frames, frames) for one, frames in zip(matched.made, dense, strict=True)]))


def _cost(problem: Problem, allocation: Allocation, made: Sequence[Made]) -> float:
    """Computed time of real runs of an allocation: of the steps that each of them computed."""
    every = (True,) * problem.n_steps
    ran = [replace(allocation, computed=one.computed or every, threshold=None) for one in made]
    return float(np.mean([problem.cost(one) for one in ran]))
