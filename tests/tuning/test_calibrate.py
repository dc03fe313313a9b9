"""Errors as large as they turned out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_accel.tuning.calibrate import calibrate
from dit_accel.tuning.problem import Allocation, Problem

sys.path.insert(0, str(Path(__file__).parent))
from drawn_problems import draw

STEPS, LAYERS, BUCKETS = 8, 2, 2


def problem(apart: bool = True) -> Problem:
    drawn = draw(4, n=STEPS, layers=LAYERS, buckets=BUCKETS, keeps=2)
    if not apart:
        return drawn
    gram = drawn.gram.copy()  # errors of sparse attention at right angles to velocities: squares add up exactly
    gram[:, :STEPS, STEPS:] = gram[:, STEPS:, :STEPS] = 0
    return replace(drawn, gram=gram)


def allocation(computed: str, keep: int) -> Allocation:
    return Allocation(tuple(x == "1" for x in computed), ((keep,) * BUCKETS,) * LAYERS)


DENSE, SPARSE, BOTH = allocation("10101010", 0), allocation("11111111", 2), allocation("11011010", 1)


@pytest.mark.parametrize(("made_up", "sparse"), [(4.0, 0.25), (0.3, 1.0), (1.0, 9.0)])
def test_runs_with_other_errors_give_both_factors(made_up: float, sparse: float) -> None:
    drawn = problem()
    real = replace(drawn, reuse=drawn.reuse * np.sqrt(made_up), sparse=drawn.sparse * np.sqrt(sparse))
    told = calibrate(drawn, [(one, real.loss(one)) for one in (DENSE, BOTH)])
    for one in (DENSE, SPARSE, BOTH, allocation("11110000", 2)):
        assert told.loss(one) == pytest.approx(real.loss(one))
        assert told.cost(one) == drawn.cost(one)


def test_what_no_run_has_is_left_as_it_is() -> None:
    drawn = problem(apart=False)
    told = calibrate(drawn, [(DENSE, 3 * drawn.loss(DENSE))])
    assert told.loss(DENSE) == pytest.approx(3 * drawn.loss(DENSE)) and np.array_equal(told.sparse, drawn.sparse)
    told = calibrate(drawn, [(SPARSE, drawn.loss(SPARSE) / 2)])
    assert told.loss(SPARSE) == pytest.approx(drawn.loss(SPARSE) / 2) and np.array_equal(told.reuse, drawn.reuse)
    nothing = calibrate(drawn, [(drawn.dense(), 1.0)])
    assert np.array_equal(nothing.reuse, drawn.reuse) and np.array_equal(nothing.sparse, drawn.sparse)


def test_no_factor_is_negative_or_boundless() -> None:
    drawn = problem()
    # less with both kinds of error than with one: no two factors say that
    told = calibrate(drawn, [(DENSE, drawn.loss(DENSE)), (BOTH, 1e-9)])
    for name in ("reuse", "sparse"):
        factor = getattr(told, name) / getattr(drawn, name)
        assert (factor >= 0.1 - 1e-9).all() and (factor <= 10 + 1e-9).all()


def test_a_threshold_counts_as_the_steps_it_computes() -> None:
    drawn = replace(problem(), expected=np.array([[np.inf, 0.1, 0.3, 0.1, 0.3, 0.1, 0.3, 0.1]]))
    one = replace(DENSE, threshold=0.25)
    assert drawn.under(0.25).schedules.tolist() != [[True] * STEPS]
    assert calibrate(drawn, [(one, 2 * drawn.loss(one))]).loss(one) == pytest.approx(2 * drawn.loss(one))
