"""Polishing: allocations nearby, no dearer, run in the order of what is predicted of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from dit_accel.tuning.allocate import fit_time
from dit_accel.tuning.polish import neighbours, polish
from dit_accel.tuning.problem import Allocation

sys.path.insert(0, str(Path(__file__).parent))
from drawn_problems import draw


@pytest.fixture
def problem():
    return draw(4, n=8, layers=2, buckets=2, keeps=2)


def test_neighbours_fit_and_the_likest_comes_first(problem) -> None:
    start = fit_time(problem, 0.5)
    found = neighbours(problem, start, 0.5)
    assert len(found) > 5 and len({*found}) == len(found)
    assert all(problem.cost(one) <= 0.5 + 1e-9 and one.computed[0] for one in found)
    losses = [problem.loss(one) for one in found]
    assert losses == sorted(losses)
    changed = [sum(a != b for a, b in zip(one.computed, start.computed, strict=True)) for one in found]
    assert {0, 2} <= {*changed} <= {0, 1, 2}
    assert any(one.predictor != start.predictor for one in found)
    forced = replace(problem, forced=problem.forced | (problem.bucket == 0))
    kept = neighbours(forced, replace(start, computed=(True,) * 8), 1.0)
    assert kept and all(all(one.computed) for one in kept)


@pytest.mark.parametrize("runs", [0, 1, 8])
def test_what_turns_out_better_is_kept_in_so_many_runs(problem, runs: int) -> None:
    start = fit_time(problem, 0.5)
    real = draw(5, n=8, layers=2, buckets=2, keeps=2)  # things turn out otherwise than predicted
    asked = []

    def run(allocation) -> float:
        asked.append(allocation)
        return -real.loss(allocation)

    best, figure = polish(problem, start, -real.loss(start), 0.5, runs, run)
    assert len(asked) == runs == len({*asked} - {start})
    assert figure == -real.loss(best) == max(-real.loss(one) for one in [start, *asked])
    if runs == 8:
        assert figure > -real.loss(start)


def test_it_ends_where_nothing_is_left(problem) -> None:
    asked = []
    start = fit_time(problem, 0.5)
    assert polish(problem, start, 1.0, 0.5, 10**6, lambda one: asked.append(one) or 0.0) == (start, 1.0)
    assert len(asked) == len(neighbours(problem, start, 0.5))


def test_schedules_that_are_told_come_first(problem) -> None:
    start, asked = fit_time(problem, 0.5), []
    told = [(True, False) * 4, (True, True) * 4, (True, False, False, True) * 2]  # the second takes too long
    polish(problem, start, 1.0, 0.5, 3, lambda one: asked.append(one) or 0.0, told)
    assert {one.computed for one in asked[:2]} == {told[0], told[2]} - {start.computed}
    assert all(problem.cost(one) <= 0.5 + 1e-9 for one in asked)


def test_layers_read_more_in_exchange_for_others() -> None:
    """At the time that is allowed nothing can read more for itself; a dense beginning stays dense."""
    problem = draw(4, n=8, layers=3, buckets=2, keeps=2)
    start = Allocation((True,) * 8, ((0, 1),) * 3)
    found = [one for one in neighbours(problem, start, problem.cost(start)) if all(one.computed)]
    exchanged = {one.keeps for one in found if sum(map(sum, one.keeps)) == 3 and one.keeps != start.keeps}
    rows = [(0, 0), (0, 1), (0, 2)]
    assert {keeps for keeps in exchanged if not any(row[0] for row in keeps)} == set(permutations(rows))
    assert ((1, 0),) * 3 in exchanged  # parts of the noise levels, too
