"""Threshold: which steps a `latent` cache would compute by itself, told from runs that it only watched. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dit_accel.caches.trials import Trial

CACHE = "latent"
DRY = {"name": CACHE, "dry_run": True, "min_steps": 0}  # watches, and computes every step
_LEAST_STEPS = 10  # below, a cache is off unless it is told otherwise
_GRID = tuple(float(x) for x in np.geomspace(2.0, 0.005, 120))  # the largest first


def on_with(steps: int) -> dict[str, int]:
    """What has a cache on with so few steps, where that must be said."""
    return {"min_steps": steps} if steps < _LEAST_STEPS else {}


def expected_of(trials: Sequence[Trial], n_steps: int) -> list[float | None]:
    """The error that a cache expected of holding each step from the one before; None where it could not tell.

    Args:
        trials: of a dry run; the branch that comes first decides for all.
    """
    branch = trials[0].branch if trials else ""
    told = {trial.step: trial.expected for trial in trials if trial.branch == branch}
    return [told.get(step) for step in range(n_steps)]


def computed_in(decisions: Mapping[str, str] | None, n_steps: int) -> tuple[bool, ...] | None:
    """Which steps of a run were computed, in any branch; None where no cache was there.

    Args:
        decisions: as `Handle.decisions` has them. A transformer counts steps that are another's as computed.
    """
    if not decisions:
        return None
    computed = [True] * n_steps
    for text in decisions.values():
        branches = [part.rpartition("=")[2].strip().ljust(n_steps, "1") for part in text.split(";")]
        computed = [had and any(row[i] == "1" for row in branches) for i, had in enumerate(computed)]
    return tuple(computed)


def steps_under(expected: Sequence[float | None], threshold: float, most: int | None = None) -> list[bool]:
    """Which steps a cache computes under a threshold: what it expects adds up from the step computed last.

    Args:
        most: steps in a row that it makes up at most (`max_consecutive`).
    """
    computed, error, row = [], 0.0, 0
    for one in expected:
        error += math.inf if one is None else one
        computed.append(error >= threshold or row == most)
        error, row = (0.0, 0) if computed[-1] else (error, row + 1)
    return computed


def thresholds_of(expected: Sequence[Sequence[float | None]], most: int | None = None) -> list[float]:
    """Thresholds under which runs compute different steps, the largest of each set, the largest first.

    Args:
        expected: of each run.
        most: as of `steps_under`.

    Returns:
        Nothing where a cache could tell nothing of one of them.
    """
    if not all(any(x is not None for x in one) for one in expected):
        return []
    found: dict[tuple[tuple[bool, ...], ...], float] = {}
    for threshold in _GRID:
        found.setdefault(tuple(tuple(steps_under(one, threshold, most)) for one in expected), threshold)
    return list(found.values())


def match_threshold(expected: Sequence[Sequence[float | None]], computed: float) -> float:
    """The largest threshold under which runs should compute no less than so many steps, as a mean."""
    for threshold in _GRID:
        if np.mean([sum(steps_under(one, threshold)) for one in expected]) >= computed - 1e-6:
            return threshold
    return _GRID[-1]
