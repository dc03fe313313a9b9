"""Tune: measure, let real runs choose a way, try it on held-out clips, and correct the aim until the budget is met."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dit_accel.errors import DitAccelError
from dit_accel.preset import Preset
from dit_accel.quality.metrics import psnr
from dit_accel.tuning.aim import correct_aim, fit_aim, is_near, predict
from dit_accel.tuning.as_preset import load, tables_of, to_toml
from dit_accel.tuning.budget import Budget
from dit_accel.tuning.matching import TRIES, Matched, match_time, run_cost
from dit_accel.tuning.measuring import Measured, Measurer
from dit_accel.tuning.plan import Plan
from dit_accel.tuning.polish import polish
from dit_accel.tuning.problem import Allocation, Problem, additivity, make_problem
from dit_accel.tuning.results import Entrant, Tried, Tuned
from dit_accel.tuning.rivals import Rival, list_rivals
from dit_accel.tuning.runs import Made, Maker, compare
from dit_accel.tuning.shelf import Shelf
from dit_accel.tuning.ways import Way, fit_way, list_ways

Say = Callable[[str], None]


class Tuner:
    """One pipeline, one plan.

    Args:
        recipe: makes clips with the pipeline.
        shelf: keeps measurements.
        bar: has `total`, `refresh()` and `update(n)`, as tqdm's.
        say: takes lines about the work.
    """

    def __init__(self, pipe: Any, recipe: Any, plan: Plan, budget: Budget, shelf: Shelf, bar: Any, say: Say) -> None:
        self.plan, self.budget, self.bar, self.say = plan, budget, bar, say
        self.maker = Maker(pipe, recipe, budget.kind == "error", lambda: bar.update(1))
        self.measurer = Measurer(pipe, plan, self.maker, shelf, bar)

    def tune(self, name: str) -> Tuned:
        """All of it.

        Args:
            name: of the preset to be.

        Raises:
            DitAccelError: the budget cannot be met; the message has the best that was reached.
        """
        plan, measured = self.plan, self.measurer.measure()
        problems = {
            i: make_problem(of, measured.gains, plan.buckets, measured.forward_share)
            for i, of in measured.samples.items()
        }
        if not plan.cache:
            problems = {i: dataclasses.replace(p, forced=np.ones_like(p.forced)) for i, p in problems.items()}
        for i, of in measured.samples.items():
            sums = additivity(of)
            self.say(
                f"{plan.methods[i].method}: squared errors of single layers add up to {min(sums):.2f} to "
                f"{max(sums):.2f} times that of all together (1: independent, as taken for granted)"
            )
        way, sure, entrants = self._choose_way(name, problems, measured)
        problem = problems[way.method]
        tries, allocations = self._aim(name, problem, way, sure, measured)
        by = self._best(tries)
        chosen, allocation = tries[by], allocations[by]
        return Tuned(
            tables=self._tables(allocation, way.method, measured),
            allocation=allocation,
            way=str(way),
            chosen=chosen,
            tries=tuple(tries),
            entrants=tuple(entrants),
            predicted=predict(problem, allocation, measured.pixels),
            rivals=tuple(self._rivals(problem, way.method, chosen, allocation, measured)),
            additivity=tuple(additivity(measured.samples[way.method])),
            forward_share=measured.forward_share,
            dense=measured.dense,
        )

    # -- choosing

    def _choose_way(
        self, name: str, problems: dict[int, Problem], measured: Measured
    ) -> tuple[Way, Allocation | None, list[Entrant]]:
        """The way that comes out best at the budget's time in real runs of the clips tuned on.

        Returns:
            With it the allocation that came out best, where the budget is a time that it keeps for sure.
        """
        budget, pixels = self.budget, measured.pixels
        ways = list_ways(problems)
        first = {way: fit_aim(problems[way.method], way, budget, budget.limit, pixels) for way in ways}
        costs = [problems[way.method].cost(one) for way, one in first.items() if one is not None]
        time = budget.limit if budget.kind == "time" else min(costs)
        entrants = []
        for way in ways:
            problem = problems[way.method]
            allocation = None if first[way] is None else fit_way(problem, way, "time", time)
            if allocation is None or problem.cost(allocation) > time + 1e-9:
                continue
            if not any(map(any, allocation.keeps)):
                way = dataclasses.replace(way, sparse=False)
            if any(one.way == way for one in entrants):
                continue  # nothing reads less, which is a way of its own
            self.bar.set_description(f"clips tuned on, {way}")
            matched = self._match_way(name, problem, way.method, allocation, time, measured)
            allocation = dataclasses.replace(allocation, threshold=matched.threshold)
            told = predict(problem, allocation, pixels)["psnr"]
            schedules = tuple(one.computed for one in matched.made if one.computed is not None)
            reached = _likeness(matched, measured.frames)
            entrants.append(Entrant(way, allocation, matched.cost, reached, told, schedules))
            self._tell(entrants[-1])
        fixed = [one for one in entrants if not one.way.adaptive]
        if budget.kind == "time" and self.plan.cache and fixed:
            seen = [schedule for one in entrants if one.way.adaptive for schedule in one.schedules]
            entrants.append(self._polish(name, problems, max(fixed, key=_psnr), time, seen, measured))
            self._tell(entrants[-1])
        if not entrants:
            return ways[0], None, []
        best = max([one for one in entrants if one.cost <= time + 1e-6] or entrants, key=_psnr)
        sure = budget.kind == "time" and not best.way.adaptive
        return best.way, best.allocation if sure else None, entrants

    def _polish(
        self,
        name: str,
        problems: dict[int, Problem],
        entrant: Entrant,
        time: float,
        seen: Sequence[tuple[bool, ...]],
        measured: Measured,
    ) -> Entrant:
        """The best of a way's neighbours, and of the schedules seen where a cache chose them."""
        way = entrant.way
        problem = problems[way.method]
        self.bar.set_description(f"clips tuned on, polishing {way}")

        def run(allocation: Allocation) -> float:
            matched = self._match_way(name, problem, way.method, allocation, time, measured)
            return _likeness(matched, measured.frames)

        best, reached = polish(problem, entrant.allocation, entrant.psnr, time, self.plan.polish, run, seen)
        told = predict(problem, best, measured.pixels)["psnr"]
        return Entrant(way, best, problem.cost(best), reached, told, polished=True)

    def _tell(self, one: Entrant) -> None:
        self.say(
            f"{one}: PSNR {one.psnr:.2f} dB on the clips tuned on at computed time {one.cost:.3f}, "
            f"{one.predicted:.2f} dB predicted"
        )

    def _match_way(
        self, name: str, problem: Problem, method: int, allocation: Allocation, time: float, measured: Measured
    ) -> Matched:
        def run(threshold: float | None) -> Matched:
            moved = dataclasses.replace(allocation, threshold=threshold)
            preset = self._preset(name, moved, method, measured)
            made = tuple(self.maker.make(preset, clip) for clip in self.plan.clips)
            return Matched(preset, _cost(problem, moved, made), made, threshold)

        return match_time(run, allocation.threshold, time, at_least=False)

    # -- aiming

    def _aim(
        self, name: str, problem: Problem, way: Way, sure: Allocation | None, measured: Measured
    ) -> tuple[list[Tried], list[Allocation]]:
        """Allocate, run, and correct the aim by how far off it was.

        Args:
            sure: an allocation that keeps the budget whatever comes of it: it is run, and no other.
        """
        budget, pixels = self.budget, measured.pixels
        tries: list[Tried] = []
        allocations: list[Allocation] = []
        aim = budget.limit
        for number in range(TRIES):
            allocation = sure or fit_aim(problem, way, budget, aim, pixels)
            if allocation is None or allocation in allocations:
                break  # never at the first: a way that has nothing for the budget is not chosen
            self.bar.set_description(f"held-out clips, try {number + 1}")
            preset = self._preset(name, allocation, way.method, measured)
            made = tuple(self.maker.make(preset, clip) for clip in self.plan.held_out)
            cost = _cost(problem, allocation, made)
            tries.append(_tried(f"tuned, try {number + 1}", Matched(preset, cost, made, None), measured.dense))
            allocations.append(allocation)
            figure, told = tries[-1].figure(budget.kind), predict(problem, allocation, pixels)
            self.say(
                f"try {number + 1}: {budget.show(figure)} on held-out clips, {told[budget.kind]:.4g} predicted; PSNR "
                f"{tries[-1].figure('psnr'):.2f} dB, computed time {cost:.3f} of dense"
            )
            if budget.met_by(figure) and is_near(budget, figure):
                break
            aim = correct_aim(budget, aim, figure)
        return tries, allocations

    def _best(self, tries: Sequence[Tried]) -> int:
        """The try that meets the budget best."""
        budget = self.budget
        met = [i for i, one in enumerate(tries) if budget.met_by(one.figure(budget.kind))]
        if met and budget.kind == "time":
            return max(met, key=lambda i: tries[i].figure("psnr"))
        if met:
            return min(met, key=lambda i: tries[i].cost)
        sign = -1 if budget.kind == "psnr" else 1
        reached = budget.show(min((one.figure(budget.kind) for one in tries), key=lambda x: sign * x))
        raise DitAccelError(
            f"budget {budget} was not met on held-out clips in {len(tries)} tries; the best reached: {reached}. "
            "Ask for less, or give more --keeps"
        )

    # -- running

    def _preset(self, name: str, allocation: Allocation, method: int, measured: Measured) -> Preset:
        return load(to_toml(name, self._tables(allocation, method, measured)), name, "tune")

    def _tables(self, allocation: Allocation, method: int, measured: Measured) -> dict[str, Any]:
        plan, noise = self.plan, measured.samples[method][0].noise
        buckets = [step * min(plan.buckets, len(noise)) // len(noise) for step in range(len(noise))]
        return tables_of(plan.base, plan.methods[method], allocation, plan.keeps, noise, buckets)

    def _rivals(
        self, problem: Problem, method: int, chosen: Tried, allocation: Allocation, measured: Measured
    ) -> list[Tried]:
        plan = self.plan
        self.bar.set_description("rivals")
        expected = [one.expected for one in measured.dense if one.expected is not None and any(one.expected)]
        found = list_rivals(
            problem, plan.keeps, plan.base, plan.methods[method], chosen.cost, expected, allocation.predictor
        )
        matched = [(rival.name, self._match(rival, problem, chosen.cost, measured)) for rival in found]
        return [_tried(name, one, measured.dense) for name, one in matched]

    def _match(self, rival: Rival, problem: Problem, time: float, measured: Measured) -> Matched:
        """Run a rival with the likest of thresholds under which it takes no less time than the tuned preset."""
        plan, dense = self.plan, [one.frames for one in measured.dense]

        def run(threshold: float | None) -> Matched:
            preset = rival.preset(plan.dense, threshold)
            keep = None if preset.sparse is None else preset.sparse.keep
            made = tuple(self.maker.make(preset, clip) for clip in plan.held_out)
            steps = preset.generate.steps
            cost = float(np.mean([run_cost(problem, plan.keeps, one.report, keep, steps) for one in made]))
            return Matched(preset, cost, made, threshold)

        return match_time(run, rival.threshold, time, True, lambda matched: _likeness(matched, dense))


def _psnr(entrant: Entrant) -> float:
    return entrant.psnr


def _likeness(matched: Matched, dense: Sequence[np.ndarray]) -> float:
    """Mean PSNR in dB against dense frames."""
    return float(np.mean([psnr(one.frames, frames) for one, frames in zip(matched.made, dense, strict=True)]))


def _cost(problem: Problem, allocation: Allocation, made: Sequence[Made]) -> float:
    """Computed time of real runs of an allocation: of the steps that each of them computed."""
    every = (True,) * problem.n_steps
    ran = [dataclasses.replace(allocation, computed=one.computed or every, threshold=None) for one in made]
    return float(np.mean([problem.cost(one) for one in ran]))


def _tried(name: str, matched: Matched, dense: Sequence[Made]) -> Tried:
    likeness = tuple(compare(one, other) for one, other in zip(matched.made, dense, strict=True))
    reports = tuple(one.report and one.report.to_dict() for one in matched.made)
    schedules = tuple(
        None if one.computed is None else "".join("01"[x] for x in one.computed) for one in matched.made
    )
    return Tried(name, matched.preset, matched.cost, likeness, reports, schedules)
