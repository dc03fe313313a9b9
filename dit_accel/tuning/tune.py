"""Tune: measure, allocate, try on held-out clips, and correct the aim until the real figure meets the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel.adapters import find_adapter
from dit_accel.errors import DitAccelError
from dit_accel.handle import accelerate
from dit_accel.options import SparseOptions
from dit_accel.preset import Preset
from dit_accel.tuning import gains as perturb
from dit_accel.tuning.allocate import fit_loss, fit_time, fit_velocity_error
from dit_accel.tuning.as_preset import load, tables_of, to_toml
from dit_accel.tuning.budget import Budget
from dit_accel.tuning.interpose import transformers_of
from dit_accel.tuning.measure import forwards, measure
from dit_accel.tuning.predictor import Predictor
from dit_accel.tuning.problem import Allocation, Problem, additivity, make_problem
from dit_accel.tuning.rivals import CACHE, LEAST_STEPS, Rival, list_rivals, run_cost
from dit_accel.tuning.runs import Clip, Likeness, Made, Maker, compare
from dit_accel.tuning.shelf import Shelf
from dit_accel.tuning.tables import Sample

TRIES = 3  # real runs of the held-out clips, to meet the budget
_AIM = 0.3, 0.93  # near enough: so many dB above what PSNR asks; this share of what time or error allow
_FARTHEST = 6.0, 2.0  # the most by which an aim is corrected: in dB, as a factor
_HEADROOM = 0.02  # computed time that a rival may take more, as a share of dense
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure, and on what."""

    base: Preset  # its recipe and sampling are used
    methods: tuple[SparseOptions, ...]  # without a schedule of their own
    keeps: tuple[float, ...]  # the largest first
    clips: tuple[Clip, ...]  # to tune on
    held_out: tuple[Clip, ...]
    cache: bool  # whether steps may be made up
    buckets: int  # parts of the noise levels that have keeps of their own
    close: int  # steps looked at closely
    perturbed: int  # steps at which runs go wrong on purpose

    @property
    def dense(self) -> Preset:
        """The base with nothing of ours."""
        told = {"pipeline": self.base.pipeline, "model": self.base.model}
        told["generate"] = dataclasses.asdict(self.base.generate)
        return load(to_toml("dense", told), "dense", "tune")

    def settings(self, machine: dict[str, Any]) -> dict[str, Any]:
        """What measurements depend on; a budget is no part of it."""
        return {
            "model": self.base.model,
            "pipeline": self.base.pipeline,
            "generate": dataclasses.asdict(self.base.generate),
            "methods": [options.to_mapping() for options in self.methods],
            "keeps": self.keeps,
            "prompts and seeds": [dataclasses.asdict(clip) for clip in self.clips],
            "held-out prompts and seeds": [dataclasses.asdict(clip) for clip in self.held_out],
            "steps looked at": [self.close, self.perturbed],
            "machine": machine,
        }


@dataclass(frozen=True)
class Tried:
    """A preset that was really run on every held-out clip."""

    name: str
    preset: Preset
    cost: float  # computed time as a share of dense
    likeness: tuple[Likeness, ...]
    reports: tuple[dict[str, Any] | None, ...]

    def figure(self, kind: str) -> float:
        """The mean over clips that a budget of this kind bounds."""
        return float(np.mean([getattr(one, kind) for one in self.likeness]))

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"name": self.name, "computed_time": round(self.cost, 4)}
        for kind in ("psnr", "ssim", "time", "seconds", "error"):
            values = [getattr(one, kind) for one in self.likeness]
            if all(value is not None for value in values):
                told[kind] = round(float(np.mean(values)), 4)
                told[f"{kind}_of_clips"] = [round(value, 4) for value in values]
        told["worst_psnr"] = round(min(one.psnr for one in self.likeness), 4)
        told["options"] = {
            key: part.to_mapping() if (part := getattr(self.preset, key)) else None for key in ("sparse", "cache")
        }
        told["steps"] = self.preset.generate.steps
        return {**told, "reports": list(self.reports)}


@dataclass(frozen=True)
class Tuned:
    """What came of it."""

    tables: dict[str, Any]  # of the preset
    allocation: Allocation
    chosen: Tried
    tries: tuple[Tried, ...]
    predicted: dict[str, float]  # of the chosen one: psnr, time, error
    rivals: tuple[Tried, ...]
    additivity: tuple[float, ...]
    samples: tuple[Sample, ...]  # of the chosen method
    forward_share: float
    dense: tuple[Made, ...]


class Tuner:
    """One pipeline, one plan.

    Args:
        recipe: makes clips with the pipeline.
        shelf: keeps measurements.
        bar: has `total`, `refresh()` and `update(n)`, as tqdm's.
        say: takes lines about the work.
    """

    def __init__(self, pipe: Any, recipe: Any, plan: Plan, budget: Budget, shelf: Shelf, bar: Any, say: Say) -> None:
        self.pipe, self.plan, self.budget, self.shelf, self.bar, self.say = pipe, plan, budget, shelf, bar, say
        self.maker = Maker(pipe, recipe, budget.kind == "error", lambda: bar.update(1))
        self._pixels = 1.0

    def tune(self, name: str) -> Tuned:
        """All of it.

        Args:
            name: of the preset to be.

        Raises:
            DitAccelError: the budget cannot be met; the message has the best that was reached.
        """
        plan = self.plan
        dense = self._dense()
        share = float(np.median([made.forward_seconds / made.seconds for made in dense]))
        self._expect(dense[0].forwards)
        samples = {i: self._samples(i) for i in range(len(plan.methods))}
        gains = self.shelf.gains(
            lambda vectors: perturb.measure_gains(
                self.pipe, vectors, samples[0][0].weights, plan.perturbed,
                lambda: self.maker.frames(plan.dense, plan.clips[0]), lambda: self.bar.update(1),
            )
        )  # fmt: skip
        self._pixels = float(np.median(gains.pixels)) if gains.pixels else 1.0
        problems = {i: make_problem(of, gains, plan.buckets, share) for i, of in samples.items()}
        if not plan.cache:
            problems = {i: dataclasses.replace(p, forced=np.ones_like(p.forced)) for i, p in problems.items()}
        for i, of in samples.items():
            sums = additivity(of)
            self.say(
                f"{plan.methods[i].method}: squared errors of single layers add up to {min(sums):.2f} to "
                f"{max(sums):.2f} times that of all together (1: independent, as taken for granted)"
            )
        tries, allocations, which = self._aim(name, problems, dense)
        met = [i for i, one in enumerate(tries) if self.budget.met_by(one.figure(self.budget.kind))]
        if not met:
            figures = [one.figure(self.budget.kind) for one in tries]
            best = figures[0]
            for figure in figures:
                best = figure if self.budget.better(figure, best) else best
            raise DitAccelError(
                f"budget {self.budget} was not met on held-out clips in {len(tries)} tries; the best reached: "
                f"{self.budget.show(best)}. Ask for less, or give more --keeps"
            )
        by = min(met, key=lambda i: tries[i].cost) if self.budget.kind != "time" else max(
            met, key=lambda i: tries[i].figure("psnr")
        )
        chosen, allocation, method = tries[by], allocations[by], which[by]
        rivals = self._rivals(problems[method], plan.methods[method], chosen, allocation.predictor, dense)
        return Tuned(
            tables=self._tables(allocation, method, samples[method][0], problems[method]),
            allocation=allocation,
            chosen=chosen,
            tries=tuple(tries),
            predicted=self._predict(problems[method], allocation),
            rivals=tuple(rivals),
            additivity=tuple(additivity(samples[method])),
            samples=tuple(samples[method]),
            forward_share=share,
            dense=tuple(dense),
        )

    # -- measuring

    def _dense(self) -> list[Made]:
        plan = self.plan
        self.bar.set_description("dense")
        return [
            self.shelf.dense(i, self.maker.velocities, lambda clip=clip: self.maker.make(plan.dense, clip))
            for i, clip in enumerate(plan.held_out)
        ]

    def _expect(self, in_a_run: int) -> None:
        """Tell the bar how many forwards are left, now that those of a run are known."""
        plan = self.plan
        steps = plan.base.generate.steps
        branches = max(1, in_a_run // steps)
        layers = sum(len(find_adapter(t).self_attentions(t)) for t in transformers_of(self.pipe).values())
        of_a_sample = forwards(steps, branches, layers, len(plan.keeps), plan.close)
        left = sum(
            of_a_sample
            for i in range(len(plan.methods))
            for j in range(len(plan.clips))
            if not self.shelf.has_sample(_sample_name(i, j))
        )
        if not self.shelf.has_gains:
            left += perturb.forwards_of(steps, plan.perturbed, branches)
        left += in_a_run * len(plan.held_out) * 4  # tries and rivals, about half of dense each
        self.bar.total = self.bar.n + left
        self.bar.refresh()

    def _samples(self, method: int) -> list[Sample]:
        plan = self.plan
        found = []
        for j, clip in enumerate(plan.clips):
            self.bar.set_description(f"measuring {plan.methods[method].method} {j + 1}/{len(plan.clips)}")

            def make(clip: Clip = clip) -> Any:
                return measure(
                    self.pipe, plan.methods[method], plan.keeps, plan.base.generate.steps, plan.close,
                    lambda: self.maker.frames(plan.dense, clip), lambda: self.bar.update(1),
                )  # fmt: skip

            found.append(self.shelf.sample(_sample_name(method, j), make, method == 0 and j == 0))
        self.bar.set_description("perturbing")
        return found

    # -- aiming

    def _aim(
        self, name: str, problems: dict[int, Problem], dense: list[Made]
    ) -> tuple[list[Tried], list[Allocation], list[int]]:
        """Allocate, run, and correct the aim by how far off it was."""
        budget, tries, allocations, which = self.budget, [], [], []
        aim = budget.limit
        for number in range(TRIES):
            method, allocation = self._allocate(problems, aim)
            if allocation in allocations and which[allocations.index(allocation)] == method:
                break
            self.bar.set_description(f"held-out clips, try {number + 1}")
            tables = self._tables(allocation, method, self._first(method), problems[method])
            preset = load(to_toml(name, tables), name, "tune")
            tried = self._run(f"tuned, try {number + 1}", preset, problems[method].cost(allocation), dense)
            tries.append(tried)
            allocations.append(allocation)
            which.append(method)
            figure = tried.figure(budget.kind)
            told = self._predict(problems[method], allocation)
            self.say(
                f"try {number + 1}: {budget.show(figure)} on held-out clips, {told[budget.kind]:.4g} predicted; PSNR "
                f"{tried.figure('psnr'):.2f} dB, computed time {tried.cost:.3f} of dense"
            )
            if budget.met_by(figure) and self._is_near(figure):
                break
            aim = self._corrected(aim, figure)
        return tries, allocations, which

    def _is_near(self, figure: float) -> bool:
        limit = self.budget.limit
        return figure <= limit + _AIM[0] if self.budget.kind == "psnr" else figure >= limit * _AIM[1]

    def _corrected(self, aim: float, figure: float) -> float:
        """Another aim, off by as much to the other side; not by more than `_FARTHEST` at once."""
        limit = self.budget.limit
        if self.budget.kind == "psnr":
            return aim + float(np.clip(limit + _AIM[0] / 3 - figure, -_FARTHEST[0], _FARTHEST[0]))
        factor = limit * (1 + _AIM[1]) / 2 / max(figure, 1e-6)
        return aim * float(np.clip(factor, 1 / _FARTHEST[1], _FARTHEST[1]))

    def _allocate(self, problems: dict[int, Problem], aim: float) -> tuple[int, Allocation]:
        """The best method's allocation for an aim, by what is predicted."""
        kind = self.budget.kind
        if kind == "time":
            found = {i: fit_time(problem, aim) for i, problem in problems.items()}
            return min(found.items(), key=lambda item: problems[item[0]].loss(item[1]))
        if kind == "psnr":
            loss = 10 ** (-aim / 10) / self._pixels
            found = {i: fit_loss(problem, loss) for i, problem in problems.items()}
        else:
            found = {i: fit_velocity_error(problem, aim) for i, problem in problems.items()}
        return min(found.items(), key=lambda item: problems[item[0]].cost(item[1]))

    def _predict(self, problem: Problem, allocation: Allocation) -> dict[str, float]:
        pixels = problem.loss(allocation) * self._pixels
        return {
            "psnr": float(min(100.0, -10 * np.log10(max(pixels, 1e-10)))),
            "time": problem.cost(allocation),
            "error": problem.velocity_error(allocation),
        }

    def _first(self, method: int) -> Sample:
        return self.shelf.read_sample(_sample_name(method, 0))

    def _tables(self, allocation: Allocation, method: int, sample: Sample, problem: Problem) -> dict[str, Any]:
        plan = self.plan
        buckets = [int(b) for b in problem.bucket]
        return tables_of(plan.base, plan.methods[method], allocation, plan.keeps, sample.noise, buckets)

    # -- running

    def _run(self, name: str, preset: Preset, cost: float, dense: Sequence[Made], clips: int | None = None) -> Tried:
        made = [self.maker.make(preset, clip) for clip in self.plan.held_out[:clips]]
        likeness = tuple(compare(one, other) for one, other in zip(made, dense, strict=False))
        return Tried(name, preset, cost, likeness, tuple(one.report and one.report.to_dict() for one in made))

    def _rivals(
        self, problem: Problem, options: SparseOptions, chosen: Tried, way: Predictor, dense: Sequence[Made]
    ) -> list[Tried]:
        plan, found = self.plan, []
        self.bar.set_description("rivals")
        trials = []
        if plan.cache and problem.n_steps >= LEAST_STEPS:
            with accelerate(self.pipe, None, cache={"name": CACHE, "dry_run": True}) as handle:
                self.maker.frames(plan.dense, plan.held_out[0])
                trials = handle.trials()
        for rival in list_rivals(problem, plan.keeps, plan.base, options, chosen.cost, trials, way):
            found.append(self._match(rival, problem, chosen.cost, dense))
        return found

    def _match(self, rival: Rival, problem: Problem, cost: float, dense: Sequence[Made]) -> Tried:
        """Run a rival, its threshold corrected on the first clip until it takes as much time, and no less."""
        plan, threshold = self.plan, rival.threshold
        best = None
        for _ in range(1 if threshold is None else TRIES):
            preset = rival.preset(plan.dense, threshold)
            made = self.maker.make(preset, plan.held_out[0])
            keep = None if preset.sparse is None else preset.sparse.keep
            took = run_cost(problem, plan.keeps, made.report, keep, preset.generate.steps)
            enough = took >= cost - 1e-6
            if best is None or (enough, -abs(took - cost)) > (best[1] >= cost - 1e-6, -abs(best[1] - cost)):
                best = preset, took, made
            if threshold is None or (enough and took <= cost + _HEADROOM):
                break
            threshold *= 0.8 if not enough else 1.2
        preset, took, first = best
        rest = [self.maker.make(preset, clip) for clip in plan.held_out[1:]]
        made = [first, *rest]
        likeness = tuple(compare(one, other) for one, other in zip(made, dense, strict=True))
        return Tried(rival.name, preset, took, likeness, tuple(one.report and one.report.to_dict() for one in made))


def _sample_name(method: int, clip: int) -> str:
    return f"{method}-{clip:03d}"
