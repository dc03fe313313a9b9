"""Allocate: give time up where it costs the least error, layers, noise levels and steps on one scale. Pure.

Greedy first: from dense on, the move with the least error for the time it saves, until the time fits. Then exchanges:
one move taken back and others made in its place, as long as that lowers the error in no more time. Moves are a layer in
a bucket to any smaller keep, a whole bucket or a whole layer to it, and one step less. On small problems this is
compared with trying everything (tests/tuning).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dit_accel.tuning.problem import Allocation, Problem

_ROUNDS = 40  # exchanges at most
_CLOSE = 1e-9
_HALVINGS = 14


def fit_time(problem: Problem, time: float) -> Allocation:
    """The best allocation found that takes at most this share of a dense run's time.

    Returns:
        The cheapest there is where none fits.
    """
    found = _descend(problem, problem.dense(), time)
    for _ in range(_ROUNDS):
        better = _exchange(problem, found, time)
        if better is None:
            break
        found = better
    return found


def fit_loss(problem: Problem, loss: float) -> Allocation:
    """The fastest allocation found whose error is at most this: `Problem.loss`."""
    return _bisect(problem, lambda allocation: problem.loss(allocation) <= loss)


def fit_velocity_error(problem: Problem, error: float) -> Allocation:
    """The fastest allocation found with at most this error of the velocity: `Problem.velocity_error`."""
    return _bisect(problem, lambda allocation: problem.velocity_error(allocation) <= error)


def _bisect(problem: Problem, fits) -> Allocation:
    low, high, best = problem.cost(_cheapest(problem)), 1.0, problem.dense()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = fit_time(problem, middle)
        if fits(found):
            best, high = found, min(middle, problem.cost(found))
        else:
            low = middle
    return best


def _cheapest(problem: Problem) -> Allocation:
    place = int(problem.saved.argmax())
    keeps = ((place,) * problem.n_buckets,) * problem.n_layers
    return Allocation(tuple(bool(forced) for forced in problem.forced), keeps)


def _descend(problem: Problem, start: Allocation, time: float) -> Allocation:
    """Move on from an allocation until the time fits, each time by what costs the least error for its time."""
    found, cost, loss = start, problem.cost(start), problem.loss(start)
    while cost > time + _CLOSE:
        best = None
        for moved in _faster(problem, found):
            cost_then = problem.cost(moved)
            if cost_then >= cost - _CLOSE:
                continue
            loss_then = problem.loss(moved)
            # beyond what is needed, saved time is worth nothing
            rate = (loss_then - loss) / (cost - max(cost_then, time))
            if best is None or rate < best[0]:
                best = rate, moved, cost_then, loss_then
        if best is None:
            return found
        _, found, cost, loss = best
    return found


def _exchange(problem: Problem, found: Allocation, time: float) -> Allocation | None:
    """The best allocation one exchange away; None if none is better."""
    best, least = None, problem.loss(found) * (1 - 1e-6)
    for slower in _slower(problem, found):
        other = _descend(problem, slower, time)
        if problem.cost(other) <= time + _CLOSE and problem.loss(other) < least:
            best, least = other, problem.loss(other)
    return best


def _faster(problem: Problem, at: Allocation) -> Iterator[Allocation]:
    for step, computed in enumerate(at.computed):
        if computed and not problem.forced[step]:
            yield _with_step(at, step, False)
    for place in range(1, len(problem.saved)):
        for cells in _groups(problem):
            if any(at.keeps[layer][bucket] < place for layer, bucket in cells):
                yield _with_keep(at, cells, place, max)


def _slower(problem: Problem, at: Allocation) -> Iterator[Allocation]:
    for step, computed in enumerate(at.computed):
        if not computed:
            yield _with_step(at, step, True)
    for place in range(len(problem.saved) - 1):
        for cells in _groups(problem):
            if any(at.keeps[layer][bucket] > place for layer, bucket in cells):
                yield _with_keep(at, cells, place, min)


def _groups(problem: Problem) -> Iterator[list[tuple[int, int]]]:
    """(layer, bucket) that move together: each alone, each layer's, each bucket's."""
    layers, buckets = range(problem.n_layers), range(problem.n_buckets)
    yield from ([(layer, bucket)] for layer in layers for bucket in buckets)
    if problem.n_buckets > 1:
        yield from ([(layer, bucket) for bucket in buckets] for layer in layers)
    if problem.n_layers > 1:
        yield from ([(layer, bucket) for layer in layers] for bucket in buckets)


def _with_step(at: Allocation, step: int, computed: bool) -> Allocation:
    return replace(at, computed=(*at.computed[:step], computed, *at.computed[step + 1 :]))


def _with_keep(at: Allocation, cells: list[tuple[int, int]], place: int, choose) -> Allocation:
    keeps = [list(row) for row in at.keeps]
    for layer, bucket in cells:
        keeps[layer][bucket] = choose(keeps[layer][bucket], place)
    return replace(at, keeps=tuple(map(tuple, keeps)))
