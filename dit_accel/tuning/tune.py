"""Tune: measure, let real runs choose a way, try it on held-out clips, and correct the aim until the budget is met."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel.errors import DitAccelError
from dit_accel.options import SparseOptions
from dit_accel.tuning.aim import correct_aim, fit_aim, is_near, predict
from dit_accel.tuning.budget import Budget
from dit_accel.tuning.carry import carry, chosen_of, describe
from dit_accel.tuning.contest import Contest, Outcome
from dit_accel.tuning.matching import TRIES, Matched, match_time, run_cost
from dit_accel.tuning.measuring import Measured, Measurer
from dit_accel.tuning.plan import Plan
from dit_accel.tuning.problem import Allocation, Problem, additivity, make_problem
from dit_accel.tuning.results import Carried, Tried, Tuned
from dit_accel.tuning.rivals import Rival, list_rivals
from dit_accel.tuning.running import Runner, likeness
from dit_accel.tuning.runs import Made, Maker, compare
from dit_accel.tuning.shelf import Shelf
from dit_accel.tuning.ways import Way


class Tuner:
    """One pipeline, one plan.

    Args:
        recipe: makes clips with the pipeline.
        shelf: keeps measurements.
        bar: has `total`, `refresh()` and `update(n)`, as tqdm's.
        say: takes lines about the work.
    """

    def __init__(
        self,
        pipe: Any,
        recipe: Any,
        plan: Plan,
        budget: Budget,
        shelf: Shelf,
        bar: Any,
        say: Callable[[str], None],
    ) -> None:
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
        runner = Runner(name, plan, self.maker, measured)
        outcome = Contest(runner, problems, self.budget, self.bar, self.say).hold()
        runner, carried = self._carry(runner, outcome)
        tries = self._aim(runner, outcome)
        best = self._best(tries)
        allocation, way, problem = best.allocation, best.way, best.problem
        return Tuned(
            tables=runner.tables(allocation, way.method),
            allocation=allocation,
            way=str(way),
            chosen=best.tried,
            tries=tuple(one.tried for one in tries),
            entrants=outcome.entrants,
            carried=carried,
            predicted=predict(problem, allocation, measured.pixels),
            rivals=tuple(self._rivals(problem, runner.plan.methods[way.method], best.tried, allocation, measured)),
            additivity=tuple(additivity(measured.samples[way.method])),
            forward_share=measured.forward_share,
            dense=measured.dense,
        )

    # -- plans carried over

    def _carry(self, runner: Runner, outcome: Outcome) -> tuple[Runner, tuple[Carried, ...]]:
        """Try on the clips tuned on whether plans may serve other branches and steps."""
        best = outcome.best
        if best is None or not best.way.sparse:
            return runner, ()
        method = best.way.method
        self.bar.set_description("clips tuned on, plans carried over")

        def run(options: Mapping[str, Any]) -> tuple[float, float]:
            told = runner.carrying(method, options)
            matched = told.run(best.problem, method, best.allocation, self.plan.clips)
            reached = likeness(matched, runner.measured.frames)
            self.say(f"{best}{describe(options)}: PSNR {reached:.2f} dB on the clips tuned on")
            return reached, matched.cost

        tried = carry(best, run)
        return runner.carrying(method, chosen_of(tried)), tried

    # -- aiming

    def _aim(self, runner: Runner, outcome: Outcome) -> list[_Try]:
        """Allocate, run on the held-out clips, and correct the aim by how far off it was."""
        budget, pixels = self.budget, runner.measured.pixels
        way, problem = outcome.way, outcome.problem
        tries: list[_Try] = []
        aim = budget.limit
        for _ in range(TRIES):
            allocation = outcome.sure or fit_aim(problem, way, budget, aim, pixels)
            if allocation is None or any(allocation == one.allocation for one in tries):
                break  # never at the first: a way that has nothing for the budget is not chosen
            tries.append(self._try(runner, len(tries) + 1, way, problem, allocation))
            figure = tries[-1].tried.figure(budget.kind)
            if budget.met_by(figure) and is_near(budget, figure):
                break
            aim = correct_aim(budget, aim, figure)
        if budget.kind == "time" and not any(budget.met_by(one.tried.cost) for one in tries):
            # a threshold that keeps the time on no clips but those tuned on; what is fixed keeps it on all
            fixed = [one for one in outcome.entrants if not one.way.adaptive and budget.met_by(one.cost)]
            if fixed:
                spare = max(fixed, key=lambda one: one.psnr)
                tries.append(self._try(runner, len(tries) + 1, spare.way, spare.problem, spare.allocation))
        return tries

    def _try(self, runner: Runner, number: int, way: Way, problem: Problem, allocation: Allocation) -> _Try:
        budget = self.budget
        self.bar.set_description(f"held-out clips, try {number}")
        matched = runner.run(problem, way.method, allocation, self.plan.held_out)
        tried = _tried(f"tuned, try {number}", matched, runner.measured.dense)
        told = predict(problem, allocation, runner.measured.pixels)[budget.kind]
        self.say(
            f"try {number}: {budget.show(tried.figure(budget.kind))} on held-out clips, {told:.4g} predicted; PSNR "
            f"{tried.figure('psnr'):.2f} dB, computed time {matched.cost:.3f} of dense"
        )
        return _Try(tried, way, problem, allocation)

    def _best(self, tries: Sequence[_Try]) -> _Try:
        """The try that meets the budget best."""
        budget = self.budget
        met = [one for one in tries if budget.met_by(one.tried.figure(budget.kind))]
        if met and budget.kind == "time":
            return max(met, key=lambda one: one.tried.figure("psnr"))
        if met:
            return min(met, key=lambda one: one.tried.cost)
        sign = -1 if budget.kind == "psnr" else 1
        reached = budget.show(min((one.tried.figure(budget.kind) for one in tries), key=lambda x: sign * x))
        raise DitAccelError(
            f"budget {budget} was not met on held-out clips in {len(tries)} tries; the best reached: {reached}. "
            "Ask for less, or give more --keeps"
        )

    # -- rivals

    def _rivals(
        self, problem: Problem, options: SparseOptions, chosen: Tried, allocation: Allocation, measured: Measured
    ) -> list[Tried]:
        plan = self.plan
        self.bar.set_description("rivals")
        expected = [one.expected for one in measured.dense if one.expected is not None and any(one.expected)]
        found = list_rivals(
            problem, plan.keeps, plan.base, options, chosen.cost, expected, allocation.predictor
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

        return match_time(run, rival.threshold, time, True, lambda matched: likeness(matched, dense))


@dataclass(frozen=True)
class _Try:
    """What was run on the held-out clips, and where it came from."""

    tried: Tried
    way: Way
    problem: Problem  # by which it was shared out
    allocation: Allocation


def _tried(name: str, matched: Matched, dense: Sequence[Made]) -> Tried:
    likeness = tuple(compare(one, other) for one, other in zip(matched.made, dense, strict=True))
    reports = tuple(one.report and one.report.to_dict() for one in matched.made)
    schedules = tuple(
        None if one.computed is None else "".join("01"[x] for x in one.computed) for one in matched.made
    )
    return Tried(name, matched.preset, matched.cost, likeness, reports, schedules)
