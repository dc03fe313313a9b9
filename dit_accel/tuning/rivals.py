"""Rivals: what one would have set by hand, and fewer steps, brought to the time of a tuned preset.

Time here is computed: forwards run and blocks read, by the seconds that were measured of them. It is the same on a busy
machine, and a rival is given no less of it than the tuned preset takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dit_accel.caches.trials import Trial
from dit_accel.options import SparseOptions
from dit_accel.preset import Preset
from dit_accel.report import Report
from dit_accel.tuning.predictor import Predictor
from dit_accel.tuning.problem import Problem

CACHE = "latent"
LEAST_STEPS = 10  # below, a cache is off unless it is told otherwise


@dataclass(frozen=True)
class Rival:
    """A way to be as fast. `threshold` is None where no step is made up."""

    name: str
    values: Mapping[str, Any]  # put over the dense preset
    threshold: float | None
    way: Mapping[str, Any] = field(default_factory=dict)  # of its cache to make steps up

    def preset(self, dense: Preset, threshold: float | None = None) -> Preset:
        """It as a preset, with a threshold of its cache in place of its own."""
        values = dict(self.values)
        if self.threshold is not None:
            values["cache"] = {"name": CACHE, "threshold": threshold or self.threshold, **self.way}
        return dense.with_values(values, "rival")


def run_cost(problem: Problem, keeps: Sequence[float], report: Report | None, keep: float | None, steps: int) -> float:
    """The computed time of a run as a share of dense.

    Args:
        keeps: what `problem.saved` is of, dense left out.
        report: of the run; None: it was dense.
        keep: what its sparse calls were asked to keep.
        steps: of its schedule.
    """
    computed = float(steps)
    saved = 0.0
    if report is not None:
        forwards = sum(report.forwards.values())
        computed *= report.forwards["computed"] / forwards if forwards else 1
        if keep is not None:
            ascending = sorted(zip((1.0, *keeps), problem.saved, strict=True))
            saved = report.sparse_share * problem.n_layers * float(np.interp(keep, *zip(*ascending, strict=True)))
    return 1 - problem.step_cost * (problem.n_steps - computed * (1 - saved))


def list_rivals(
    problem: Problem,
    keeps: Sequence[float],
    base: Preset,
    options: SparseOptions,
    cost: float,
    trials: list[Trial],
    predictor: Predictor,
) -> Iterator[Rival]:
    """Fewer steps, and hand-set settings: those of the base preset and uniform keeps, without and with a cache.

    Args:
        predictor: what the tuned preset makes steps up by; the cache that is set by hand holds, and with dense
            attention is also tried with this.
    """
    n = problem.n_steps
    fewer = min(n, math.ceil(n - (1 - cost) / problem.step_cost - 1e-6))
    if fewer >= 1:
        yield Rival(f"{fewer} steps", {"generate.steps": fewer}, None)
    plain = options.to_mapping()
    settings: dict[str, tuple[dict[str, Any] | None, float]] = {}
    for place, keep in reversed(list(enumerate(keeps, start=1))):
        saved = problem.n_layers * problem.saved[place]
        if 1 - problem.step_cost * n * saved >= cost - 1e-9:  # the smallest keep that takes no less time
            yield Rival(f"keep {keep:g} everywhere", {"sparse": {**plain, "keep": keep}}, None)
            break
    middle = len(keeps) // 2
    settings[f"keep {keeps[middle]:g} everywhere"] = (
        {**plain, "keep": keeps[middle]},
        problem.n_layers * problem.saved[middle + 1],
    )
    if base.sparse is not None:
        settings[f"sparse as {base.name}"] = base.sparse.to_mapping(), _saved_of(problem, keeps, base.sparse)
    settings["dense"] = None, 0.0
    if n < LEAST_STEPS or not trials:
        return
    for name, (sparse, saved) in settings.items():
        threshold = match_threshold(problem, trials, saved, cost)
        values = {} if sparse is None else {"sparse": sparse}
        yield Rival(f"{name}, {CACHE} cache", values, threshold)
        if sparse is None and predictor.order:
            way = f"{CACHE} cache of order {predictor.order} over {predictor.over}"
            yield Rival(f"{name}, {way}", values, threshold, asdict(predictor))


def _saved_of(problem: Problem, keeps: Sequence[float], sparse: SparseOptions) -> float:
    """About what a preset's own sparse attention saves of a forward, where it is sparse."""
    ascending = sorted(zip((1.0, *keeps), problem.saved, strict=True))
    return problem.n_layers * float(np.interp(sparse.keep or 1.0, *zip(*ascending, strict=True)))


def match_threshold(problem: Problem, trials: Sequence[Trial], saved: float, cost: float) -> float:
    """The largest threshold under which a cache should take no less time than `cost`.

    Args:
        trials: of a dry run. What a cache expects adds up from the step computed last.
        saved: of each computed forward, by sparse attention.
    """
    allowed = (problem.n_steps * problem.step_cost - (1 - cost)) / (problem.step_cost * max(1 - saved, 1e-9))
    needed = min(problem.n_steps, math.ceil(allowed - 1e-6))
    for threshold in np.geomspace(2.0, 0.005, 120):
        if computed_under(problem.n_steps, trials, float(threshold)) >= needed:
            return float(threshold)
    return 0.005


def computed_under(n_steps: int, trials: Sequence[Trial], threshold: float) -> int:
    """How many steps a cache would compute, told from a dry run's expectations."""
    branch = trials[0].branch
    expected = {trial.step: trial.expected for trial in trials if trial.branch == branch}
    computed, error = 0, 0.0
    for step in range(n_steps):
        error += expected.get(step, math.inf)
        if error >= threshold:
            computed, error = computed + 1, 0.0
    return computed
