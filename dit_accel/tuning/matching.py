"""Matching: a cache's threshold, moved until real runs take the time that they are to take.

Time here is computed: forwards run and blocks read, by the seconds that were measured of them. It is the same on a busy
machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dit_accel.preset import Preset
from dit_accel.report import Report
from dit_accel.tuning.problem import Problem
from dit_accel.tuning.runs import Made

TRIES = 4
HEADROOM = 0.02  # how far from the time that was asked for is near enough, as a share of dense
_STEP = 1.3  # factor of a threshold, until it lies between two that were tried


@dataclass(frozen=True)
class Matched:
    """Runs of clips, and what they took."""

    preset: Preset
    cost: float  # computed time as a share of dense, the mean over clips
    made: tuple[Made, ...]
    threshold: float | None


def match_time(
    run: Callable[[float | None], Matched],
    threshold: float | None,
    time: float,
    at_least: bool,
    likeness: Callable[[Matched], float] | None = None,
) -> Matched:
    """The runs that are nearest to a time, and on the right side of it where any are.

    Args:
        run: makes the clips with a threshold; the smaller, the more it computes.
        threshold: to begin with; None: there is none to move, and one run is made.
        at_least: whether no less time is to be taken than this, or no more.
        likeness: of runs; with it every try is made, and the likest of those that are near enough is taken: the same
            time is often taken under thresholds that are decibels apart.
    """

    def misfit(one: Matched) -> tuple[bool, float]:
        over = one.cost - time
        return (over if at_least else -over) < -1e-6, abs(over)

    found: list[Matched] = []
    slow, fast = 0.0, math.inf  # thresholds known to take more time, and less
    for _ in range(1 if threshold is None else TRIES):
        one = run(threshold)
        found.append(one)
        over = one.cost - time
        if threshold is None or (likeness is None and misfit(one) <= (False, HEADROOM)):
            break
        if over > 0:
            slow = max(slow, threshold)
        else:
            fast = min(fast, threshold)
        if slow > 0 and fast < math.inf:
            threshold = math.sqrt(slow * fast)
        else:
            threshold *= _STEP if over > 0 else 1 / _STEP

    near = [one for one in found if misfit(one) <= (False, HEADROOM)]
    return min(found, key=misfit) if likeness is None or not near else max(near, key=likeness)


def run_cost(problem: Problem, keeps: Sequence[float], report: Report | None, keep: float | None, steps: int) -> float:
    """The computed time of a run as a share of dense.

    Args:
        keeps: what `problem.saved` is of, dense left out.
        report: of the run; None: it was dense.
        keep: what its sparse calls were asked to keep.
        steps: of its schedule.
    """
    computed = float(steps)
    saved = 0.0
    if report is not None:
        forwards = sum(report.forwards.values())
        computed *= report.forwards["computed"] / forwards if forwards else 1
        if keep is not None:
            ascending = sorted(zip((1.0, *keeps), problem.saved, strict=True))
            saved = report.sparse_share * problem.n_layers * float(np.interp(keep, *zip(*ascending, strict=True)))
    return 1 - problem.step_cost * (problem.n_steps - computed * (1 - saved))
