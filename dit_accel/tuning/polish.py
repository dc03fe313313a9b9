"""Polish: real runs of the clips tuned on, where predictions rank too coarsely.

What is predicted says in which order to try: an allocation next to the best so far, run for real, takes its place if it
comes out better. Errors are predicted to first order alone, and early steps lay a clip out anew: among allocations that
are predicted alike, some turn out several dB better (docs/tune.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from dit_accel.tuning.predictor import HOLD, PREDICTORS
from dit_accel.tuning.problem import Allocation, Problem

_FARTHEST = 2  # steps by which a computed one is moved at once
_LAYERS = 6  # that are thought of as reading more in exchange for as many others
_CLOSE = 1e-9


def neighbours(problem: Problem, found: Allocation, time: float) -> list[Allocation]:
    """Allocations next to a fixed schedule that take no more than a time, the best by what is predicted first."""
    others = dict.fromkeys(one for one in _moved(problem, found) if one != found)
    fitting = [one for one in others if problem.cost(one) <= time + _CLOSE]
    return sorted(fitting, key=problem.loss)


def _moved(problem: Problem, found: Allocation) -> Iterator[Allocation]:
    computed, free = found.computed, [not forced for forced in problem.forced]
    for step, is_computed in enumerate(computed):
        for to in range(max(step - _FARTHEST, 0), min(step + _FARTHEST + 1, len(computed))):
            if is_computed and free[step] and free[to] and not computed[to]:
                yield replace(found, computed=tuple(i == to or (x and i != step) for i, x in enumerate(computed)))
    for step, is_computed in enumerate(computed):
        if not is_computed:
            yield replace(found, computed=tuple(x or i == step for i, x in enumerate(computed)))
    buckets = [[(layer, bucket) for layer in range(problem.n_layers)] for bucket in range(problem.n_buckets)]
    sparse = [bucket for bucket in range(problem.n_buckets) if any(row[bucket] for row in found.keeps)]
    layers = [[(layer, bucket) for bucket in sparse] for layer in range(problem.n_layers)]  # the rest stays dense
    for places in (buckets, layers):  # parts of the noise levels, or layers, read more; or some of them do for others
        more, less = ([_read(problem, found, one, way) for one in places] for way in (-1, 1))
        yield from (*more, *less)
        best = sorted(range(len(places)), key=lambda i: problem.loss(more[i]))[:_LAYERS]
        spared = sorted(range(len(places)), key=lambda i: problem.loss(less[i]))[:_LAYERS]
        yield from (_read(problem, more[i], places[j], 1) for i in best for j in spared if i != j)
    if not all(computed):
        yield from (replace(found, predictor=predictor) for predictor in PREDICTORS if predictor != found.predictor)


def _read(problem: Problem, found: Allocation, places: Sequence[tuple[int, int]], way: int) -> Allocation:
    """An allocation that at these layers and buckets reads one keep less, or more where `way` is -1."""
    last, keeps = len(problem.saved) - 1, [list(row) for row in found.keeps]
    for layer, bucket in places:
        keeps[layer][bucket] = min(max(keeps[layer][bucket] + way, 0), last)
    return replace(found, keeps=tuple(map(tuple, keeps)))


def polish(
    problem: Problem,
    start: Allocation,
    figure: float,
    time: float,
    runs: int,
    run: Callable[[Allocation], float],
    schedules: Sequence[tuple[bool, ...]] = (),
) -> tuple[Allocation, float]:
    """The best allocation found in so many real runs.

    Args:
        figure: of the start; the larger, the better.
        time: computed time that none may take more of.
        runs: at most.
        run: gives the figure of an allocation.
        schedules: which steps to compute, to be tried first (what a cache chose of clips, say).
    """
    best, seen = start, {start}
    told = [replace(start, computed=computed, predictor=HOLD) for computed in schedules]
    told = sorted((one for one in dict.fromkeys(told) if problem.cost(one) <= time + _CLOSE), key=problem.loss)
    while runs > 0:
        fresh = [one for one in (*told, *neighbours(problem, best, time)) if one not in seen]
        if not fresh:
            break
        runs -= 1
        seen.add(fresh[0])
        reached = run(fresh[0])
        if reached > figure:
            best, figure = fresh[0], reached
    return best, figure
