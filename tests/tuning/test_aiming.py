"""Tries on held-out clips: what takes longer there than on the clips tuned on gives way to what is fixed."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dit_accel.preset import load_preset
from dit_accel.tuning.budget import Budget
from dit_accel.tuning.contest import Outcome
from dit_accel.tuning.matching import Matched
from dit_accel.tuning.problem import Allocation, Problem
from dit_accel.tuning.results import Entrant
from dit_accel.tuning.runs import Clip, Made
from dit_accel.tuning.tune import Tuner
from dit_accel.tuning.ways import Way, fit_way

sys.path.insert(0, str(Path(__file__).parent))
from drawn_problems import draw

CLIP = Made(np.zeros((1, 16, 16, 3), np.uint8), 1.0, 0.8, 4, None)
LIMIT = 0.6


class Runner:
    """Held-out clips take `late` more than they should where a threshold decides."""

    measured = SimpleNamespace(pixels=1.0, dense=(CLIP,))

    def __init__(self, late: float) -> None:
        self.late, self.ran = late, []

    def run(self, problem: Problem, method: int, allocation: Allocation, clips: tuple[Clip, ...]) -> Matched:
        self.ran.append(allocation)
        late = self.late if allocation.threshold is not None else 0.0
        return Matched(load_preset("tiny-wan"), problem.cost(allocation) + late, (CLIP,), allocation.threshold)


class Bar:
    def set_description(self, text: str) -> None:
        pass


def aim(late: float, budget: Budget) -> tuple[Tuner, list, Outcome]:
    problem = replace(
        draw(3, n=8, layers=2, buckets=2, keeps=2), expected=np.array([[math.inf, *np.linspace(0.4, 0.1, 7)]])
    )
    ways = Way(0, True, False), Way(0, False, True), Way(0, False, False)
    entrants = []
    for way, psnr in zip(ways, (40.0, 30.0, 20.0), strict=True):
        found = fit_way(problem, way, "time", LIMIT)
        entrants.append(Entrant(way, problem, found, problem.cost(found), psnr, psnr))
    outcome = Outcome(ways[0], problem, None, tuple(entrants))
    tuner = Tuner(None, None, SimpleNamespace(held_out=()), budget, None, Bar(), lambda text: None)
    return tuner, tuner._aim(Runner(late), outcome), outcome


def test_a_threshold_that_keeps_the_time_is_kept() -> None:
    tuner, tries, outcome = aim(0.0, Budget("time", LIMIT))
    assert tuner._best(tries).way == outcome.way and all(one.way.adaptive for one in tries)


def test_one_that_takes_longer_on_other_clips_gives_way_to_the_best_that_is_fixed() -> None:
    tuner, tries, outcome = aim(0.5, Budget("time", LIMIT))
    assert all(one.way.adaptive for one in tries[:-1]) and len(tries) > 1
    best = tuner._best(tries)
    assert (best.way, best.allocation) == (outcome.entrants[1].way, outcome.entrants[1].allocation)
    assert best.tried.cost <= LIMIT + 1e-9 and best.tried.name == f"tuned, try {len(tries)}"


def test_nothing_fixed_takes_its_place_for_another_kind_of_budget() -> None:
    _, tries, _ = aim(0.5, Budget("psnr", 1.0))
    assert all(one.way.adaptive for one in tries)
