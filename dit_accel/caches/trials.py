"""Trials: what a dry run learns. Every step is computed, and beside it stands what reuse would have given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One step that could have been made up."""

    role: str
    branch: str
    step: int
    noise: float
    expected: float  # what the cache expected, comparable with its threshold
    error: float  # relative L1 of what it would have given, against what was computed; the worst of the batch
    figures: tuple[tuple[str, float], ...] = ()  # what else the cache measures (magnitudes, say)


def threshold_for(trials: Iterable[Trial], error: float) -> float:
    """The largest threshold under which no step of the trials would have been made up with a larger error.

    Trials reuse the step before, so this bounds the first of several reuses in a row; later ones add to it.

    Args:
        trials: of a dry run.
        error: the relative L1 that one reuse may make.

    Returns:
        a threshold of the cache that ran; 0 if even the least expected error came out larger than allowed.
    """
    allowed = 0.0
    for trial in sorted(trials, key=lambda trial: trial.expected):
        if trial.error > error:
            # reuse happens below the threshold, so that this trial is computed
            return min(trial.expected, allowed)
        allowed = trial.expected * (1 + 1e-6)
    return allowed
