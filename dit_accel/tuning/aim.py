"""Aim: where to point an allocation, so that what really comes of it meets the budget. Pure."""

from __future__ import annotations

import numpy as np

from dit_accel.tuning.budget import Budget
from dit_accel.tuning.problem import Allocation, Problem
from dit_accel.tuning.ways import Way, fit_way

_NEAR = 0.3, 0.95  # near enough: so many dB above what PSNR asks; this share of what time or error allow
_FARTHEST = 6.0, 2.0  # the most by which an aim is corrected at once: in dB, as a factor


def fit_aim(problem: Problem, way: Way, budget: Budget, aim: float, pixels: float) -> Allocation | None:
    """The best allocation of a way that is predicted to reach an aim.

    Args:
        aim: in the budget's unit; differs from the budget's limit where predictions were off.
        pixels: mean squared error of the frames over that of the latents.
    """
    if budget.kind == "psnr":
        return fit_way(problem, way, "loss", 10 ** (-aim / 10) / pixels)
    return fit_way(problem, way, budget.kind, aim)


def predict(problem: Problem, allocation: Allocation, pixels: float) -> dict[str, float]:
    """PSNR in dB, computed time and error of the velocity."""
    squared = problem.loss(allocation) * pixels
    return {
        "psnr": float(min(100.0, -10 * np.log10(max(squared, 1e-10)))),
        "time": problem.cost(allocation),
        "error": problem.velocity_error(allocation),
    }


def is_near(budget: Budget, figure: float) -> bool:
    """Whether a figure that meets the budget wastes little of it."""
    limit = budget.limit
    return figure <= limit + _NEAR[0] if budget.kind == "psnr" else figure >= limit * _NEAR[1]


def correct_aim(budget: Budget, aim: float, figure: float) -> float:
    """Another aim, off by as much to the other side; not by more than `_FARTHEST` at once."""
    limit = budget.limit
    if budget.kind == "psnr":
        return aim + float(np.clip(limit + _NEAR[0] / 3 - figure, -_FARTHEST[0], _FARTHEST[0]))
    factor = limit * (1 + _NEAR[1]) / 2 / max(figure, 1e-6)
    return aim * float(np.clip(factor, 1 / _FARTHEST[1], _FARTHEST[1]))
