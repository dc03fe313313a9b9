"""Ways to meet a bound: each keeps it, and a cache's schedules are reckoned clip by clip."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_accel.tuning.ways import MOST, Way, fit_way, list_ways

sys.path.insert(0, str(Path(__file__).parent))
from drawn_problems import draw

SCHEDULE, STEPS, THRESHOLD, DENSE = (
    Way(0, adaptive, sparse) for adaptive, sparse in [(False, True), (False, False), (True, True), (True, False)]
)


@pytest.fixture
def problem():
    plain = draw(3, n=8, layers=2, buckets=2, keeps=2)
    rng = np.random.default_rng(5)
    expected = np.concatenate(
        [np.full((len(plain.gram), 2), np.inf), rng.uniform(0.05, 0.4, (len(plain.gram), 6))], 1
    )
    return replace(plain, expected=expected)


def test_ways_there_are(problem) -> None:
    capped = [replace(way, most=most) for most in MOST[1:] for way in (THRESHOLD, DENSE)]
    assert list_ways({0: problem}) == [SCHEDULE, STEPS, THRESHOLD, DENSE, *capped]
    assert list_ways({0: replace(problem, forced=np.ones(8, bool))}) == [SCHEDULE]
    assert list_ways({0: replace(problem, expected=np.full_like(problem.expected, np.inf))}) == [SCHEDULE, STEPS]
    assert len(list_ways({0: problem, 1: problem})) == 3 + 3 * len(MOST)


@pytest.mark.parametrize("way", [SCHEDULE, STEPS, THRESHOLD, DENSE], ids=str)
def test_bounds_hold(problem, way: Way) -> None:
    for time in (0.8, 0.6, 0.45):
        found = fit_way(problem, way, "time", time)
        assert problem.cost(found) <= time + 1e-9
        assert (found.threshold is not None) == way.adaptive
        assert way.sparse or not any(map(any, found.keeps))
    loss = problem.loss(fit_way(problem, way, "time", 0.6))
    again = fit_way(problem, way, "loss", loss * (1 + 1e-9))
    assert problem.loss(again) <= loss * (1 + 1e-8) and problem.cost(again) <= 0.6 + 0.05
    assert problem.velocity_error(fit_way(problem, way, "error", 0.5)) <= 0.5


def test_sparse_attention_is_used_where_it_helps(problem) -> None:
    for time in (0.6, 0.45):
        ways = [fit_way(problem, way, "time", time) for way in (THRESHOLD, DENSE)]
        assert problem.loss(ways[0]) <= problem.loss(ways[1]) * (1 + 1e-9)


def test_a_threshold_that_makes_nothing_up_is_no_way_of_its_own(problem) -> None:
    high = replace(problem, expected=np.full_like(problem.expected, np.inf))
    high.expected[:, -1] = 5.0  # so much at the one step that a cache can tell of, that it computes it
    (only,) = high.thresholds()
    assert high.under(only).schedules.all()
    assert fit_way(high, THRESHOLD, "time", 0.9) is None and fit_way(high, SCHEDULE, "time", 0.9) is not None


def test_a_cache_is_reckoned_clip_by_clip(problem) -> None:
    threshold = problem.thresholds()[4]
    under = problem.under(threshold)
    told = under.dense()
    assert told.threshold == threshold
    alone = []
    for s, schedule in enumerate(under.schedules):
        one = replace(problem, gram=problem.gram[s : s + 1], shares=problem.shares[s : s + 1])
        fixed = replace(problem.dense(), computed=tuple(schedule.tolist()))
        alone.append((one.cost(fixed), one.loss(fixed), one.velocity_error(fixed) ** 2))
    costs, losses, errors = np.array(alone).mean(0)
    assert problem.cost(told) == pytest.approx(costs) == under.cost(told)
    assert problem.loss(told) == pytest.approx(losses)
    assert problem.velocity_error(told) == pytest.approx(errors**0.5)
    assert fit_way(problem, THRESHOLD, "time", 0.01) is None


@pytest.mark.parametrize("way", [THRESHOLD, DENSE], ids=str)
def test_a_cap_on_steps_in_a_row_holds_or_there_is_no_such_way(problem, way: Way) -> None:
    found = [fit_way(problem, replace(way, most=2), "time", time) for time in (0.8, 0.6, 0.45)]
    assert any(found)
    for one in filter(None, found):
        assert one.most == 2
        schedules = replace(problem, most=2).under(one.threshold).schedules
        assert not any("000" in "".join("01"[int(x)] for x in row) for row in schedules)
        assert problem.cost(one) == replace(problem, most=2).cost(one)
        assert problem.cost(one) > problem.cost(replace(one, most=None)), "steps that the cap has computed"
    assert fit_way(problem, replace(way, most=6), "time", 0.6) is None, "six steps may be made up at most"
