"""Allocation against problems whose best answer is known, or found by trying everything."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_accel.tuning.allocate import fit_loss, fit_time, fit_velocity_error
from dit_accel.tuning.predictor import PREDICTORS, Predictor
from dit_accel.tuning.problem import Allocation, Problem

sys.path.insert(0, str(Path(__file__).parent))
from drawn_problems import draw, make


def everything(problem: Problem) -> list[Allocation]:
    """Every allocation, with every way to make steps up."""
    n, cells = problem.n_steps, problem.n_layers * problem.n_buckets
    steps = [(True, *rest) for rest in itertools.product((True, False), repeat=n - 1)]
    found = []
    for row in itertools.product(range(len(problem.saved)), repeat=cells):
        keeps = tuple(row[i :: problem.n_layers] for i in range(problem.n_layers))
        found += [Allocation(computed, keeps, way) for computed in steps for way in PREDICTORS]
    return found


def test_the_layer_that_does_not_matter_is_made_sparse_first() -> None:
    shares = np.zeros((3, 4, 2))
    shares[:, :, 1] = np.array([1.0, 0.01, 1.0])[:, None]
    gram = np.eye(8)
    problem = make(shares, gram, weights=np.ones(4), bucket=[0] * 4, saved=[0, 0.2])
    found = fit_time(problem, 0.8)
    assert found == Allocation((True,) * 4, ((0,), (1,), (0,)))
    assert problem.cost(found) == pytest.approx(0.8)
    assert problem.loss(found) == pytest.approx(4 * 0.01)


def test_the_step_that_changes_nothing_is_made_up() -> None:
    velocities = np.array([[1.0, 0], [2, 0], [2, 0], [4, 1]])  # step 2 is as step 1
    vectors = np.concatenate([velocities, np.zeros((4, 2))])
    problem = make(np.zeros((1, 4, 1)), vectors @ vectors.T, weights=np.ones(4), bucket=[0] * 4, saved=[0.0])
    found = fit_time(problem, 0.75)
    assert found.computed == (True, True, False, True)
    assert problem.loss(found) == pytest.approx(0, abs=1e-12)
    assert problem.velocity_error(found) == pytest.approx(0, abs=1e-6)
    # and the loss is that of the vectors, errors in a row added up before they are squared
    held = Allocation((True, False, False, True), ((0,),))
    assert problem.loss(held) == pytest.approx(2.0**2)
    assert problem.velocity_error(held) == pytest.approx(np.sqrt((0.25 + 0.25) / 4))


def test_a_velocity_on_a_line_is_continued() -> None:
    """Over the number of the step; every second step tells all others."""
    velocities = np.outer(np.arange(6), [1.0, 2.0]) + np.array([3.0, 0.0])
    vectors = np.concatenate([velocities, np.zeros((6, 2))])
    problem = make(np.zeros((1, 6, 1)), vectors @ vectors.T, weights=np.ones(6), bucket=[0] * 6, saved=[0.0])
    found = fit_time(problem, 2 / 6)
    assert found == Allocation((True, True, False, False, False, False), ((0,),), Predictor(1, "step"))
    assert problem.loss(found) == pytest.approx(0, abs=1e-12)
    assert problem.velocity_error(found) == pytest.approx(0, abs=1e-6)


def test_a_made_up_step_carries_the_error_of_sparse_attention() -> None:
    velocities, errors = np.ones((3, 1)), np.array([[0.1], [0.2], [0.4]])
    vectors = np.concatenate([velocities, errors])
    shares = np.zeros((1, 3, 2))
    shares[..., 1] = [[4.0, 1.0, 1.0]]
    weights = np.array([1.0, 2.0, 3.0])
    problem = make(shares, vectors @ vectors.T, weights=weights, bucket=[0] * 3, saved=[0, 0.5])
    sparse = Allocation((True, False, True), ((1,),))
    assert problem.loss(sparse) == pytest.approx((0.1 * 2 * (1 + 2) + 0.4 * 3) ** 2)
    assert problem.cost(sparse) == pytest.approx(1 - (0.5 + 1 + 0.5) / 3)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_with_exchanges_comes_near_the_best_of_all(seed: int) -> None:
    problem = draw(seed, n=4, layers=2, buckets=2, keeps=2)
    table = [(problem.cost(one), problem.loss(one)) for one in everything(problem)]
    assert len(table) == 8 * 81 * len(PREDICTORS)
    for time in (0.8, 0.6, 0.45):
        found = fit_time(problem, time)
        assert problem.cost(found) <= time + 1e-9
        best = min(loss for cost, loss in table if cost <= time + 1e-9)
        assert best - 1e-9 <= problem.loss(found) <= best * 1.1 + 1e-9


def test_bounds_on_error_hold_and_are_used() -> None:
    problem = draw(1, n=6, layers=2, buckets=2, keeps=2)
    worst = problem.loss(fit_time(problem, 0.4))
    for share in (0.5, 0.1, 0.01):
        found = fit_loss(problem, worst * share)
        assert problem.loss(found) <= worst * share
        assert problem.cost(found) < 1
    costs = [problem.cost(fit_loss(problem, worst * share)) for share in (0.5, 0.1, 0.01)]
    assert costs == sorted(costs)
    found = fit_velocity_error(problem, 0.2)
    assert 0 < problem.velocity_error(found) <= 0.2


def test_the_cheapest_where_nothing_fits_and_forced_steps_stay() -> None:
    problem = draw(2, n=4, layers=1, buckets=1, keeps=1)
    found = fit_time(problem, 0.0)
    assert found == Allocation((True, False, False, False), ((1,),))
    forced = Problem(**{**vars(problem), "forced": np.array([True, False, True, False])})
    assert fit_time(forced, 0.0).computed == (True, False, True, False)
