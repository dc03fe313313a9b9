"""Ways run against one another: real errors, here those of another problem than the one that predicts, decide."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dit_accel.tuning import contest
from dit_accel.tuning.budget import Budget
from dit_accel.tuning.problem import Allocation, Problem

sys.path.insert(0, str(Path(__file__).parent))
from drawn_problems import draw

PIXELS = 1e-3


class Runner:
    """Runs nothing: an allocation is as like dense as it is in a problem that the contest does not see."""

    plan = SimpleNamespace(cache=True, polish=0)
    measured = SimpleNamespace(pixels=PIXELS, frames=())

    def __init__(self, real: Problem) -> None:
        self.real, self.ran = real, []

    def match(self, problem: Problem, method: int, allocation: Allocation, time: float) -> SimpleNamespace:
        self.ran.append(allocation)
        cost, loss = self.real.cost(allocation), self.real.loss(allocation)
        psnr = -10 * math.log10(max(loss * PIXELS, 1e-10))
        return SimpleNamespace(cost=cost, made=(), threshold=allocation.threshold, psnr=psnr)


class Bar:
    def set_description(self, text: str) -> None:
        pass


@pytest.fixture(autouse=True)
def likeness(monkeypatch):
    monkeypatch.setattr(contest, "likeness", lambda matched, frames: matched.psnr)


def problem(seed: int = 4) -> Problem:
    drawn = draw(seed, n=10, layers=2, buckets=2, keeps=2)
    return replace(drawn, expected=np.array([[math.inf, *np.linspace(0.4, 0.05, 9)]]))


def hold(predicted: Problem, real: Problem, budget: Budget) -> tuple[contest.Outcome, Runner, list[str]]:
    runner, said = Runner(real), []
    return contest.Contest(runner, {0: predicted}, budget, Bar(), said.append).hold(), runner, said


@pytest.mark.parametrize(
    ("seed", "kind", "factor"), [(4, "reuse", 3), (6, "reuse", 2), (4, "sparse", 0.3), (6, "sparse", 3)]
)
def test_a_way_is_shared_out_anew_by_how_large_errors_turned_out(seed: int, kind: str, factor: float) -> None:
    predicted = problem(seed)
    real = replace(predicted, **{kind: factor * getattr(predicted, kind)})
    outcome, _, said = hold(predicted, real, Budget("time", 0.5))
    assert len(said) == len(outcome.entrants)
    in_time = [one for one in outcome.entrants if one.cost <= 0.5 + 1e-6]
    chosen = max(in_time, key=lambda one: one.psnr)
    assert chosen.psnr > 1 + max(one.psnr for one in in_time if not one.corrected and not one.polished)
    assert chosen.corrected and (outcome.way, outcome.problem) == (chosen.way, chosen.problem)
    assert outcome.sure == chosen.allocation
    assert any(f"{chosen.way}, corrected: PSNR {chosen.psnr:.2f} dB" in line for line in said)


def test_what_is_predicted_well_is_not_run_again() -> None:
    _, runner, _ = hold(problem(), problem(), Budget("time", 0.5))
    tried = [(one.threshold, one.most, one.computed, one.keeps, one.predictor) for one in runner.ran]
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize("budget", [Budget("psnr", 35.0), Budget("error", 0.2)])
def test_the_way_that_is_chosen_has_something_for_the_budget(budget: Budget) -> None:
    predicted = problem()
    real = replace(predicted, reuse=30 * predicted.reuse, sparse=30 * predicted.sparse)
    outcome, _, _ = hold(predicted, real, budget)
    assert contest.fit_aim(outcome.problem, outcome.way, budget, budget.limit, PIXELS) is not None
    assert outcome.sure is None


def test_what_one_would_set_by_hand_goes_on_where_it_is_better() -> None:
    """The first step's error is taken for nothing, and is what matters most: keep it dense, as a hand would."""
    predicted = replace(problem(), expected=None, forced=np.ones(10, bool), sparse=np.full(10, 0.5))
    late = predicted.sparse * (predicted.bucket == 1)
    real = replace(predicted, sparse=late + 100 * (predicted.bucket == 0))
    told = replace(predicted, sparse=late + 1e-6 * (predicted.bucket == 0))
    outcome, _, _ = hold(told, real, Budget("time", 0.7))
    best = max(outcome.entrants, key=lambda one: one.psnr)
    assert outcome.sure == best.allocation and best.allocation.keeps == ((0, 2), (0, 2))
    first = outcome.entrants[0].allocation  # what was shared out
    assert any(row[0] for row in first.keeps) and real.loss(first) > 100 * real.loss(best.allocation)
