"""Contest: the best of each way runs on the clips tuned on, all at one computed time, and the likest goes on.

What one would set by hand, one keep in all layers, runs too: nothing that was shared out goes on that is worse.

What is predicted ranks ways, and what to give up in each, too coarsely (docs/tune.md). So each way is shared out anew
by how large its errors turned out, and the best schedule is polished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dit_accel.tuning.aim import fit_aim, predict
from dit_accel.tuning.budget import Budget
from dit_accel.tuning.calibrate import calibrate
from dit_accel.tuning.polish import polish
from dit_accel.tuning.problem import Allocation, Problem
from dit_accel.tuning.results import Entrant
from dit_accel.tuning.running import Runner, likeness
from dit_accel.tuning.ways import Way, fit_way, list_ways, one_keep

_CORRECTIONS = 3  # of what is predicted, by what real runs had, at most
_CLOSE = 1e-6


@dataclass(frozen=True)
class Outcome:
    """The way that came out best."""

    way: Way
    problem: Problem  # by which it was shared out
    sure: Allocation | None  # what came out best, where the budget is a time that it keeps for sure
    entrants: tuple[Entrant, ...]  # none where there was no choice
    best: Entrant | None = None  # of these


@dataclass(frozen=True)
class Contest:
    """One budget.

    Args:
        problems: by method.
        bar: has `set_description`, as tqdm's.
        say: takes lines about the work.
    """

    runner: Runner
    problems: Mapping[int, Problem]
    budget: Budget
    bar: Any
    say: Callable[[str], None]

    def hold(self) -> Outcome:
        """All of it."""
        problems, budget = self.problems, self.budget
        first = {way: self._fit(problems[way.method], way) for way in list_ways(problems)}
        ways = [way for way, allocation in first.items() if allocation is not None]
        costs = [problems[way.method].cost(first[way]) for way in ways]
        time = budget.limit if budget.kind == "time" else min(costs)
        entrants: list[Entrant] = []
        for way in ways:
            problem = problems[way.method]
            entrants += self._enter(problem, way, fit_way(problem, way, "time", time), time, entrants)
        for i, problem in problems.items():
            for allocation in one_keep(problem, time):
                entrants += self._enter(problem, Way(i, False, True), allocation, time, entrants)
        for way in dict.fromkeys(replace(one.way, sparse=True) for one in entrants):
            entrants += self._correct(way, time, entrants)
        fixed = [one for one in entrants if not one.way.adaptive]
        if budget.kind == "time" and self.runner.plan.cache and fixed:
            seen = [schedule for one in entrants if one.way.adaptive for schedule in one.schedules]
            entrants.append(self._polish(max(fixed, key=_psnr), time, seen))
        if not entrants:
            return Outcome(ways[0], problems[ways[0].method], None, ())
        ranked = sorted(entrants, key=lambda one: (one.cost <= time + _CLOSE, one.psnr), reverse=True)
        best = next(one for one in ranked if self._fit(one.problem, one.way))
        sure = best.allocation if budget.kind == "time" and not best.way.adaptive else None
        return Outcome(best.way, best.problem, sure, tuple(entrants), best)

    def _fit(self, problem: Problem, way: Way) -> Allocation | None:
        """What is predicted to meet the budget."""
        return fit_aim(problem, way, self.budget, self.budget.limit, self.runner.measured.pixels)

    def _enter(
        self,
        problem: Problem,
        way: Way,
        allocation: Allocation | None,
        time: float,
        entrants: Sequence[Entrant],
        corrected: bool = False,
    ) -> list[Entrant]:
        """Run an allocation; nothing where there is none for the time, or it is no new one."""
        if allocation is None or problem.cost(allocation) > time + _CLOSE:
            return []
        way = replace(way, sparse=any(map(any, allocation.keeps)))
        if any(one.way == way and _are_alike(one.allocation, allocation) for one in entrants):
            return []
        self.bar.set_description(f"clips tuned on, {way}")
        matched = self.runner.match(problem, way.method, allocation, time)
        allocation = replace(allocation, threshold=matched.threshold)
        schedules = tuple(one.computed for one in matched.made if one.computed is not None)
        reached = likeness(matched, self.runner.measured.frames)
        told = self._predict(problem, allocation)
        return [self._tell(Entrant(way, problem, allocation, matched.cost, reached, told, schedules, corrected))]

    def _correct(self, way: Way, time: float, entrants: Sequence[Entrant]) -> list[Entrant]:
        """Share a way out anew by how large both kinds of error turned out, as long as that helps."""
        problem, pixels = self.problems[way.method], self.runner.measured.pixels
        kind = way.adaptive, way.most
        known = [
            one
            for one in entrants
            if (one.way.adaptive, one.way.most) == kind and (one.way.method == way.method or not one.way.sparse)
        ]
        corrected: list[Entrant] = []
        for _ in range(_CORRECTIONS):
            runs = [(one.allocation, 10 ** (-one.psnr / 10) / pixels) for one in (*known, *corrected)]
            told = calibrate(problem, runs)
            allocation = fit_way(told, way, "time", time)
            found = self._enter(told, way, allocation, time, (*known, *corrected), corrected=True)
            helped = found and found[0].psnr > max((one.psnr for one in corrected), default=-math.inf)
            corrected += found
            if not helped:
                break
        return corrected

    def _polish(self, entrant: Entrant, time: float, seen: Sequence[tuple[bool, ...]]) -> Entrant:
        """The best of a schedule's neighbours, and of the schedules seen where a cache chose them."""
        way, problem = entrant.way, entrant.problem
        self.bar.set_description(f"clips tuned on, polishing {way}")

        def run(allocation: Allocation) -> float:
            matched = self.runner.match(problem, way.method, allocation, time)
            return likeness(matched, self.runner.measured.frames)

        runs = self.runner.plan.polish
        best, reached = polish(problem, entrant.allocation, entrant.psnr, time, runs, run, seen)
        told = self._predict(problem, best)
        return self._tell(Entrant(way, problem, best, problem.cost(best), reached, told, polished=True))

    def _predict(self, problem: Problem, allocation: Allocation) -> float:
        return predict(problem, allocation, self.runner.measured.pixels)["psnr"]

    def _tell(self, one: Entrant) -> Entrant:
        self.say(
            f"{one}: PSNR {one.psnr:.2f} dB on the clips tuned on at computed time {one.cost:.3f}, "
            f"{one.predicted:.2f} dB predicted"
        )
        return one


def _are_alike(one: Allocation, other: Allocation) -> bool:
    """Whether two come to the same, now that a threshold is moved until the time fits."""
    adaptive = one.threshold is not None
    return one.keeps == other.keeps and (
        adaptive or (one.computed, one.predictor) == (other.computed, other.predictor)
    )


def _psnr(entrant: Entrant) -> float:
    return entrant.psnr
