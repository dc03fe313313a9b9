"""Thresholds told from dense runs, on a small real Wan: the steps that a cache then computes, and what that costs."""

from __future__ import annotations

import numpy as np
import pytest

from dit_accel.pipelines import wan
from dit_accel.preset import load_preset
from dit_accel.testing import tiny_wan_pipeline
from dit_accel.tuning.plan import Plan
from dit_accel.tuning.runs import Clip, Maker
from dit_accel.tuning.threshold import computed_in, match_threshold, steps_under, thresholds_of

EXPECTED = [None, None, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1]


def test_what_is_expected_adds_up_from_the_step_computed_last() -> None:
    assert steps_under(EXPECTED, 0.35) == [True, True, False, True, False, False, True, False]
    assert steps_under(EXPECTED, 0.0) == [True] * 8
    assert steps_under(EXPECTED, 9.0) == [True, True] + [False] * 6
    assert steps_under(EXPECTED, 9.0, 2) == [True, True, False, False, True, False, False, True]
    assert steps_under(EXPECTED, 0.35, 2) == steps_under(EXPECTED, 0.35)


def test_thresholds_that_differ_and_the_largest_that_computes_enough() -> None:
    other = [None, None, *[0.05] * 6]
    found = thresholds_of([EXPECTED, other])
    assert found == sorted(found, reverse=True)
    plans = [(tuple(steps_under(EXPECTED, x)), tuple(steps_under(other, x))) for x in found]
    assert len(set(plans)) == len(plans) > 4
    assert thresholds_of([EXPECTED, [None] * 8]) == []
    for wanted in (3, 5, 6.5):
        threshold = match_threshold([EXPECTED, other], wanted)
        counts = [sum(steps_under(one, threshold)) for one in (EXPECTED, other)]
        assert np.mean(counts) >= wanted
        larger = [sum(steps_under(one, threshold * 1.06)) for one in (EXPECTED, other)]
        assert np.mean(larger) < wanted, "a larger one of the grid would do as well"


@pytest.mark.parametrize(
    ("decisions", "computed"),
    [
        ({}, None),
        ({"transformer": "1101"}, (True, True, False, True)),
        ({"transformer": "cond=1101; uncond=1001"}, (True, True, False, True)),
        ({"transformer": "10", "transformer_2": "1110"}, (True, False, True, False)),
    ],
)
def test_which_steps_ran_of_what_caches_decided(decisions, computed) -> None:
    assert computed_in(decisions, 4) == computed


@pytest.mark.parametrize("most", [None, 2])
def test_a_watching_cache_changes_nothing_and_foresees_its_first_steps(most: int | None) -> None:
    pipe = tiny_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    small = {"generate.width": 64, "generate.height": 64, "generate.frames": 5, "generate.steps": 12}
    base = load_preset("tiny-wan").with_values(small, "test")
    plan = Plan(base, (), (), (), (), True, 1, 1, 1)
    maker, clip = Maker(pipe, wan, False, lambda: None), Clip("star", 3)
    watched, plain = maker.make(plan.dense, clip, watched=True), maker.make(plan.dense, clip)
    assert np.array_equal(watched.frames, plain.frames)
    assert watched.report is None and watched.computed is None and plain.expected is None
    assert watched.expected[:2] == (None, None) and all(x > 0 for x in watched.expected[2:])

    threshold = thresholds_of([watched.expected], most)[3]
    preset = base.with_values({"cache": {"name": "latent", "threshold": threshold, "max_consecutive": most}}, "test")
    made = maker.make(preset, clip)
    foreseen = steps_under(watched.expected, threshold, most)
    first = foreseen.index(False)  # until there nothing was made up, and the run is the dense one
    assert made.computed[: first + 1] == tuple(foreseen[: first + 1])
    assert sum(made.computed) * 2 == made.report.forwards["computed"] < 24
