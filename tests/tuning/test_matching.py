"""A threshold is moved until runs take the time they are to take, on the side that is asked for."""

from __future__ import annotations

import pytest

from dit_accel.preset import load_preset
from dit_accel.tuning.matching import HEADROOM, TRIES, Matched, match_time

PRESET = load_preset("tiny-wan")


def runs(asked: list[float | None], cost) -> object:
    def run(threshold: float | None) -> Matched:
        asked.append(threshold)
        return Matched(PRESET, cost(threshold), (), threshold)

    return run


@pytest.mark.parametrize("at_least", [True, False])
@pytest.mark.parametrize("start", [0.1, 0.2, 0.3])
def test_the_nearest_on_the_right_side(start: float, at_least: bool) -> None:
    asked: list[float | None] = []
    found = match_time(runs(asked, lambda x: 0.1 / x), start, 0.5, at_least)
    assert asked[0] == start and len(asked) <= TRIES
    costs = [0.1 / x for x in asked]
    right = [x for x in costs if (x >= 0.5 if at_least else x <= 0.5)]
    assert found.cost == (min(right, key=lambda x: abs(x - 0.5)) if right else min(costs, key=lambda x: abs(x - 0.5)))


def test_near_enough_is_run_once_and_so_is_what_has_no_threshold() -> None:
    asked: list[float | None] = []
    assert match_time(runs(asked, lambda _: 0.5 + HEADROOM / 2), 0.2, 0.5, True).threshold == 0.2
    assert match_time(runs(asked, lambda _: 0.9), None, 0.5, False).cost == 0.9
    assert asked == [0.2, None]


def test_the_likest_of_what_is_near_enough() -> None:
    asked: list[float | None] = []
    costs = iter([0.505, 0.515, 0.49, 0.51])
    likeness = {0.505: 20.0, 0.515: 24.0, 0.49: 40.0, 0.51: 22.0}  # the third takes too little time
    found = match_time(runs(asked, lambda _: next(costs)), 0.2, 0.5, True, lambda one: likeness[one.cost])
    assert found.cost == 0.515 and len(asked) == TRIES
