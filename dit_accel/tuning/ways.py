"""Ways: the kinds of preset that an aim can be met by, and the best of each kind by what is predicted. Pure.

Steps are left out by a fixed schedule, or by a `latent` cache with a threshold, which follows each clip; and attention
is dense, or sparse by layer and noise level. Which kind is best is not predicted well enough to be trusted: real runs
of the clips tuned on decide (`aim.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from dit_accel.tuning.allocate import fit_loss, fit_time, fit_velocity_error
from dit_accel.tuning.problem import Allocation, Problem

_CLOSE = 1e-9
# Steps in a row that a cache with a threshold makes up at most. Where it expects little error for long, the clip may
# still go another way: with tiny-wan one of five did, 20 dB farther from dense than under a cap of 4 (no record).
MOST = (None, 6, 4)


@dataclass(frozen=True)
class Way:
    """A kind of preset."""

    method: int  # place of the sparse method among those to choose from
    adaptive: bool  # a threshold decides which steps are computed
    sparse: bool
    most: int | None = None  # of MOST

    def __str__(self) -> str:
        steps = "steps by a threshold" if self.adaptive else "steps by a schedule"
        rows = "" if self.most is None else f", {self.most} in a row at most"
        return f"{steps}{rows}, {'sparse' if self.sparse else 'dense'} attention"


def list_ways(problems: dict[int, Problem]) -> list[Way]:
    """Every way there is; dense attention counts once, for it is the same beside any method."""
    first = min(problems)
    ways = [Way(i, False, True) for i in problems]
    if problems[first].forced.all():
        return ways
    ways.append(Way(first, False, False))
    if problems[first].thresholds():
        for most in MOST:
            ways += [Way(i, True, True, most) for i in problems] + [Way(first, True, False, most)]
    return ways


def fit_way(problem: Problem, way: Way, kind: str, limit: float) -> Allocation | None:
    """The best allocation of a way under a bound.

    Args:
        kind: of the bound: "time", "loss" or "error".

    Returns:
        None where no threshold that makes steps up keeps the bound, or a cap on steps in a row changes nothing; of
        schedules the cheapest where none does.
    """
    if not way.adaptive:
        # where nothing is saved by reading less, no move reads less
        moves = problem if way.sparse else replace(problem, saved=np.zeros_like(problem.saved))
        return _fit(moves, kind, limit)
    problem = replace(problem, most=way.most)
    thresholds = [x for x in problem.thresholds() if not problem.under(x).schedules.all()]
    thresholds = [x for x in thresholds if way.most is None or _is_capped(problem, x)]
    found = [_under(problem.under(threshold), way, kind, limit) for threshold in thresholds]
    found = [one for one in found if one is not None]
    if not found:
        return None
    best = min(found, key=problem.loss if kind == "time" else problem.cost)
    if not way.sparse or kind != "time":
        return best
    return min(best, fit_time(problem.under(best.threshold), limit), key=problem.loss)


def one_keep(problem: Problem, time: float) -> Iterator[Allocation]:
    """What one would set by hand: of each keep all layers at it, behind as many dense parts of the noise levels as fit.

    Args:
        time: that none may take more of.
    """
    dense = problem.dense()
    for place, saved in enumerate(problem.saved):
        for first in reversed(range(problem.n_buckets) if saved > 0 else ()):
            row = (0,) * first + (place,) * (problem.n_buckets - first)
            found = replace(dense, keeps=(row,) * problem.n_layers)
            if problem.cost(found) <= time + _CLOSE:
                yield found
                break


def _is_capped(problem: Problem, threshold: float) -> bool:
    """Whether the cap on steps in a row has any of them computed."""
    free = replace(problem, most=None)
    return bool((problem.under(threshold).schedules != free.under(threshold).schedules).any())


def _under(problem: Problem, way: Way, kind: str, limit: float) -> Allocation | None:
    if not way.sparse:
        return _checked(problem, kind, limit, problem.dense())
    if kind == "time":
        return _checked(problem, kind, limit, fit_time(problem, limit, exchanges=False))
    return _checked(problem, kind, limit, _fit(problem, kind, limit))


def _fit(problem: Problem, kind: str, limit: float) -> Allocation:
    fit: dict[str, Callable[[Problem, float], Allocation]] = {
        "time": fit_time, "loss": fit_loss, "error": fit_velocity_error,
    }  # fmt: skip
    return fit[kind](problem, limit)


def _checked(problem: Problem, kind: str, limit: float, found: Allocation) -> Allocation | None:
    figure = {"time": problem.cost, "loss": problem.loss, "error": problem.velocity_error}[kind](found)
    return found if figure <= limit + _CLOSE and not math.isnan(figure) else None
