"""Plans carried over to other branches and steps: what is tried, and what is taken of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dit_accel.options import SparseOptions
from dit_accel.preset import load_preset
from dit_accel.tuning import tune
from dit_accel.tuning.budget import Budget
from dit_accel.tuning.carry import SLACK, carry, chosen_of, describe
from dit_accel.tuning.contest import Outcome
from dit_accel.tuning.plan import Plan
from dit_accel.tuning.results import Entrant
from dit_accel.tuning.rivals import list_rivals
from dit_accel.tuning.running import Runner
from dit_accel.tuning.runs import Clip
from dit_accel.tuning.ways import Way, fit_way

sys.path.insert(0, str(Path(__file__).parent))
from drawn_problems import draw

SHARED, SECOND = {"share_plans": True}, {"predict_every": 2}
START, COST = 30.0, 0.8


def entrant(sparse: bool = True) -> Entrant:
    problem, way = draw(0, n=4, layers=2, buckets=2, keeps=2), Way(0, False, sparse)
    return Entrant(way, problem, fit_way(problem, way, "time", COST), COST, START, START)


def tried(figures: Mapping[tuple[bool, int], float], late: float = 0.0) -> list[tuple[Mapping[str, Any], bool]]:
    """What is tried and taken, where (shared, interval) has these figures."""

    def run(options: Mapping[str, Any]) -> tuple[float, float]:
        return figures[options.get("share_plans", False), options.get("predict_every", 1)], COST + late

    return [(one.options, one.taken) for one in carry(entrant(), run)]


def test_each_goes_on_from_what_was_taken() -> None:
    found = tried({(True, 1): 31.0, (True, 2): 31.0 - SLACK / 2, (True, 4): 29.0})
    assert found == [(SHARED, True), (SHARED | SECOND, True), (SHARED | {"predict_every": 4}, False)]


def test_what_costs_too_much_is_left_and_longer_intervals_with_it() -> None:
    assert tried({(True, 1): 29.0, (False, 2): 29.5}) == [(SHARED, False), (SECOND, False)]
    # what was lost before counts: slack is no allowance for each
    assert tried({(True, 1): START - 0.04, (True, 2): START - 0.08}) == [(SHARED, True), (SHARED | SECOND, False)]


def test_what_takes_longer_is_left() -> None:
    assert not any(taken for _, taken in tried({(True, 1): 40.0, (False, 2): 40.0}, late=0.01))


def test_the_last_that_is_taken_is_chosen() -> None:
    figures = {"share_plans": 31.0, "predict_every": 20.0}
    found = carry(entrant(), lambda options: (figures[list(options)[-1]], COST))
    assert chosen_of(found) == SHARED and chosen_of(found[1:]) == {} == chosen_of(())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ""),
        (SHARED, ", one plan for all branches"),
        (SECOND, ", a plan every 2 steps"),
        (SparseOptions(method="pooled", keep=0.5).to_mapping(), ""),
    ],
)
def test_in_words(options: Mapping[str, Any], told: str) -> None:
    assert describe(options) == told


def carried_by(gain: Mapping[str, float], sparse: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Runner, tuple, list]:
    """What a tuner carries over, where runs are as like dense as `gain` has it; and what it said."""
    best = entrant(sparse)
    keeps, options = (0.5, 0.2), SparseOptions(method="pooled", keep=0.2)
    base = load_preset("tiny-wan-fast").with_values({"generate.steps": 4}, "few")
    plan = Plan(base, (options,), keeps, (Clip("x", 1),), (), True, 2, 1, 1)
    sample = SimpleNamespace(noise=[1.0, 0.9, 0.8, 0.6])
    measured = SimpleNamespace(samples={0: [sample]}, frames=())
    runner = Runner("mine", plan, None, measured)

    def run(self: Runner, problem, method, allocation, clips) -> SimpleNamespace:
        told = self.preset(allocation, method).sparse  # as it would be written and read
        psnr = START + sum(more for key, more in gain.items() if getattr(told, key) != getattr(options, key))
        return SimpleNamespace(cost=COST, psnr=psnr)

    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(tune, "likeness", lambda matched, frames: matched.psnr)
    said: list[str] = []
    bar = SimpleNamespace(set_description=lambda text: None)
    tuner = tune.Tuner(None, None, plan, Budget("time", COST), None, bar, said.append)
    outcome = Outcome(best.way, best.problem, best.allocation, (best,), best)
    return (*tuner._carry(runner, outcome), said)


def test_the_preset_and_what_is_set_by_hand_carry_plans_over(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, found, said = carried_by({"share_plans": 1.0, "predict_every": -1.0}, True, monkeypatch)
    assert [one.taken for one in found] == [True, False] and len(said) == 2
    assert "one plan for all branches: PSNR 31.00 dB" in said[0]
    best = entrant()
    preset = runner.preset(best.allocation, 0)
    assert preset.sparse.share_plans and preset.sparse.predict_every == 1
    options = runner.plan.methods[0]
    named = {one.name: one for one in list_rivals(best.problem, (0.5, 0.2), runner.plan.base, options, COST, (), None)}
    by_hand = [name for name in named if name.startswith("keep")]
    assert by_hand and all(name.endswith(", one plan for all branches") for name in by_hand)
    assert all(named[name].preset(load_preset("tiny-wan")).sparse.share_plans for name in by_hand)


def test_nothing_is_carried_over_where_it_costs_or_attention_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, found, _ = carried_by({"share_plans": -1.0, "predict_every": -1.0}, True, monkeypatch)
    assert len(found) == 2 and runner.plan.methods[0] == SparseOptions(method="pooled", keep=0.2)
    runner, found, said = carried_by({}, False, monkeypatch)
    assert found == () and said == []
