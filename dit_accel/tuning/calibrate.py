"""Calibrate: errors as large as real runs had them, in place of what was predicted. Pure.

What is predicted to first order is off by a factor for each kind of error: a threshold follows the clip and does better
than a schedule of as many steps, sparse attention's error meets a model that mends some of it. Runs that differ in how
much of each kind they have tell both factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dit_accel.tuning.problem import Allocation, Problem

_FARTHEST = 100.0  # a factor of a squared error, or one over it: what lies beyond is noise of a few clips


def calibrate(problem: Problem, runs: Sequence[tuple[Allocation, float]]) -> Problem:
    """The same problem, with steps made up and sparse attention as bad as they turned out.

    Args:
        runs: allocations and the mean squared error that each really had, in the latents; of one kind, for what a
            threshold decides and what is fixed are off by factors of their own.

    Returns:
        It as it is, as to a kind of error that none of the runs has.
    """
    shares = np.array([_parts(problem, allocation) for allocation, _ in runs])  # [R, 2]
    real = np.array([loss for _, loss in runs])
    factors = _solve(shares / real[:, None])
    reuse, sparse = np.sqrt(np.clip(factors, 1 / _FARTHEST, _FARTHEST))
    return replace(problem, reuse=problem.reuse * reuse, sparse=problem.sparse * sparse)


def _parts(problem: Problem, allocation: Allocation) -> tuple[float, float]:
    """What steps made up, and sparse attention, are predicted to cost without the other."""
    without = replace(problem, sparse=0 * problem.sparse), replace(problem, reuse=0 * problem.reuse)
    return without[0].loss(allocation), without[1].loss(allocation)


def _solve(shares: np.ndarray) -> np.ndarray:
    """Factors of the two columns, no less than 0, that bring every row's sum nearest to 1; 1 for an empty column."""
    factors, there = np.ones(2), shares.max(0) > 0
    if not there.any():
        return factors
    best = np.inf
    for used in ([True, True], [True, False], [False, True]):
        mask = there & used
        if not mask.any():
            continue
        found = np.where(there, 0.0, 1.0)
        found[mask] = np.linalg.lstsq(shares[:, mask], np.ones(len(shares)), rcond=None)[0]
        off = float(np.square(shares[:, there] @ found[there] - 1).sum())
        if (found >= 0).all() and off < best - 1e-12:
            factors, best = found, off
    return factors
