"""Allocate: give time up where it costs the least error, layers, noise levels and steps on one scale. Pure.

Greedy first, for every way to make steps up: from dense on, the move with the least error for the time it saves, until
the time fits; of all moves, and of either kind alone, for a made-up step is worth the less the less its computing
takes. Then exchanges, for the best two ways: one move taken back and others made in its place, as long as that lowers
the error in no more time. Moves are a layer in a bucket to any smaller keep, a whole bucket or a whole layer to it, and
one step less. On small problems this is compared with trying everything (tests/tuning).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dit_accel.tuning.predictor import HOLD, PREDICTORS
from dit_accel.tuning.problem import Allocation, Problem

_ROUNDS = 12  # exchanges at most
_WAYS = 2  # to make steps up, from whose starts exchanges begin: the best after the descent
_CLOSE = 1e-9
_HALVINGS = 7
_MANY = 100  # layers times buckets above which single ones are not exchanged: that would take minutes

Many = tuple[np.ndarray, np.ndarray]  # allocations: which steps are computed, bool [M, n], and keeps, int [M, L, B]


def fit_time(problem: Problem, time: float, exchanges: bool = True) -> Allocation:
    """The best allocation found that takes at most this share of a dense run's time.

    Args:
        exchanges: whether to go on from what greedy moves find.

    Returns:
        The cheapest there is where none fits.
    """
    ways = PREDICTORS if not problem.forced.all() else (HOLD,)
    starts = [(way, _greedy(way, time)) for way in map(problem.made_up_by, ways)]
    fitting = [(way, [one for one in found if problem.cost(one) <= time + _CLOSE]) for way, found in starts]
    ranked = sorted((pair for pair in fitting if pair[1]), key=lambda pair: min(map(problem.loss, pair[1])))
    if not ranked:
        every = [one for _, found in starts for one in found]
        return min(every, key=lambda one: (problem.cost(one), problem.loss(one)))
    if not exchanges:
        return min(ranked[0][1], key=problem.loss)
    return min((_improve(way, one, time) for way, found in ranked[:_WAYS] for one in found), key=problem.loss)


def _greedy(problem: Problem, time: float) -> list[Allocation]:
    starts = {_descend(problem, problem.dense(), time, moves): None for moves in ("both", "steps", "keeps")}
    return list(starts)


def _improve(problem: Problem, found: Allocation, time: float) -> Allocation:
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


def _bisect(problem: Problem, fits: Callable[[Allocation], bool]) -> Allocation:
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
    computed = tuple(bool(forced) for forced in problem.forced)
    return Allocation(computed, keeps, problem.predictor, problem.threshold, problem.most)


def _descend(problem: Problem, start: Allocation, time: float, moves: str = "both") -> Allocation:
    """Move on from an allocation until the time fits, each time by what costs the least error for its time.

    Args:
        moves: "steps" makes up steps alone, "keeps" reads less alone.
    """
    computed, keeps = np.array(start.computed), np.array(start.keeps)
    cost, loss = problem.cost(start), problem.loss(start)
    while cost > time + _CLOSE:
        more = _faster(problem, computed, keeps, moves)
        costs = problem.costs(*more)
        more = tuple(x[costs < cost - _CLOSE] for x in more)
        costs = costs[costs < cost - _CLOSE]
        if not len(costs):
            break
        losses = problem.losses(*more)
        # beyond what is needed, saved time is worth nothing
        best = int(np.argmin((losses - loss) / (cost - np.maximum(costs, time))))
        computed, keeps, cost, loss = more[0][best], more[1][best], costs[best], losses[best]
    return _allocation(problem, computed, keeps)


def _exchange(problem: Problem, found: Allocation, time: float) -> Allocation | None:
    """The best allocation one exchange away; None if none is better."""
    best, least = None, problem.loss(found) * (1 - 1e-6)
    slower = _slower(problem, np.array(found.computed), np.array(found.keeps))
    for computed, keeps in zip(*slower, strict=True):
        other = _descend(problem, _allocation(problem, computed, keeps), time)
        if problem.cost(other) <= time + _CLOSE and (loss := problem.loss(other)) < least:
            best, least = other, loss
    return best


def _faster(problem: Problem, computed: np.ndarray, keeps: np.ndarray, moves: str) -> Many:
    places = range(1, len(problem.saved))
    steps = np.flatnonzero(computed & ~problem.forced) if moves != "keeps" else []
    groups = _groups(problem, True) if moves != "steps" else _groups(problem, True)[:0]
    return _moved(computed, keeps, steps, [np.where(groups, np.maximum(keeps, place), keeps) for place in places])


def _slower(problem: Problem, computed: np.ndarray, keeps: np.ndarray) -> Many:
    groups = _groups(problem, keeps.size <= _MANY)
    places = range(len(problem.saved) - 1)
    others = [np.where(groups, np.minimum(keeps, place), keeps) for place in places]
    return _moved(computed, keeps, np.flatnonzero(~computed), others)


def _moved(computed: np.ndarray, keeps: np.ndarray, steps: Sequence[int], others: list[np.ndarray]) -> Many:
    """Everything one move away: a step the other way round, or other keeps."""
    turned = np.repeat(computed[None], len(steps), 0)
    turned[np.arange(len(steps)), steps] ^= True
    changed = np.concatenate([keeps[None][:0], *others])
    changed = changed[(changed != keeps).any((1, 2))]
    same = np.repeat(computed[None], len(changed), 0), np.repeat(keeps[None], len(steps), 0)
    return np.concatenate([turned, same[0]]), np.concatenate([same[1], changed])


def _groups(problem: Problem, alone: bool) -> np.ndarray:
    """bool [G, L, B]: what moves together: a layer in a bucket alone, a layer, a bucket."""
    layers, buckets = np.eye(problem.n_layers, dtype=bool), np.eye(problem.n_buckets, dtype=bool)
    both = np.einsum("il,jb->ijlb", layers, buckets).reshape(-1, len(layers), len(buckets))
    rows = np.repeat(layers[:, :, None], problem.n_buckets, 2)
    columns = np.repeat(buckets[:, None, :], problem.n_layers, 1)
    return np.concatenate([both, rows, columns] if alone else [rows, columns])


def _allocation(problem: Problem, computed: np.ndarray, keeps: np.ndarray) -> Allocation:
    keeps = tuple(map(tuple, keeps.tolist()))
    return Allocation(tuple(computed.tolist()), keeps, problem.predictor, problem.threshold, problem.most)
