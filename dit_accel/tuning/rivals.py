"""Rivals: what one would have set by hand, and fewer steps, brought to the computed time of a tuned preset, no less.

Plans are carried over as in the tuned preset. The base preset's own sparse attention also runs as it is, whatever it
takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dit_accel.options import SparseOptions
from dit_accel.preset import Preset
from dit_accel.tuning.carry import describe
from dit_accel.tuning.predictor import Predictor
from dit_accel.tuning.problem import Problem
from dit_accel.tuning.threshold import CACHE, match_threshold, on_with


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
            few = on_with(dense.generate.steps)
            values["cache"] = {"name": CACHE, "threshold": threshold or self.threshold, **self.way, **few}
        return dense.with_values(values, "rival")


def list_rivals(
    problem: Problem,
    keeps: Sequence[float],
    base: Preset,
    options: SparseOptions,
    cost: float,
    expected: Sequence[Sequence[float | None]],
    predictor: Predictor,
) -> Iterator[Rival]:
    """Fewer steps, and hand-set settings: those of the base preset and uniform keeps, without and with a cache.

    Args:
        expected: what a cache expected of each step of dense runs; nothing where none is to be tried.
        predictor: what the tuned preset makes steps up by; the cache that is set by hand holds, and with dense
            attention is also tried with this.
    """
    n = problem.n_steps
    fewer = min(n, math.ceil(n - (1 - cost) / problem.step_cost - 1e-6))
    if fewer >= 1:
        yield Rival(f"{fewer} steps", {"generate.steps": fewer}, None)
    plain = options.to_mapping()
    for rival in _one_keep(problem, keeps, plain, cost):
        yield replace(rival, name=rival.name + describe(plain))
    if base.sparse is not None:
        yield Rival(f"sparse as {base.name}", {"sparse": base.sparse.to_mapping()}, None)
    if not expected:
        return
    middle = len(keeps) // 2
    settings: dict[str, tuple[dict[str, Any] | None, float]] = {  # and what they save of a forward
        f"keep {keeps[middle]:g} everywhere{describe(plain)}": (
            {**plain, "keep": keeps[middle]},
            problem.n_layers * problem.saved[middle + 1],
        )
    }
    if base.sparse is not None:
        settings[f"sparse as {base.name}"] = base.sparse.to_mapping(), _saved_of(problem, keeps, base.sparse)
    settings["dense"] = None, 0.0
    for name, (sparse, saved) in settings.items():
        # a forward with this sparse attention costs less, so that more of them fit
        allowed = (n * problem.step_cost - (1 - cost)) / (problem.step_cost * max(1 - saved, 1e-9))
        threshold = match_threshold(expected, min(float(n), allowed))
        values = {} if sparse is None else {"sparse": sparse}
        yield Rival(f"{name}, {CACHE} cache", values, threshold)
        if sparse is None and predictor.order:
            way = f"{CACHE} cache of order {predictor.order} over {predictor.over}"
            yield Rival(f"{name}, {way}", values, threshold, asdict(predictor))


def _one_keep(
    problem: Problem, keeps: Sequence[float], plain: Mapping[str, Any], cost: float
) -> Iterator[Rival]:
    """Of each keep: all layers at it, after as many dense steps as make it take no less time."""
    n = problem.n_steps
    for place, keep in reversed(list(enumerate(keeps, start=1))):
        saved = problem.step_cost * problem.n_layers * problem.saved[place]  # of a step
        if saved <= 0:
            continue  # takes longer than dense
        first = max(0, math.ceil(n - (1 - cost) / saved - 1e-6))
        if first == 0:
            yield Rival(f"keep {keep:g} everywhere", {"sparse": {**plain, "keep": keep}}, None)
            break  # larger ones take longer
        if first < n:
            above = round(float(problem.noise[first - 1] + problem.noise[first]) / 2, 4)
            name = f"keep {keep:g}, the first {first} dense"
            yield Rival(name, {"sparse": {**plain, "keep": keep, "dense_above": above}}, None)


def _saved_of(problem: Problem, keeps: Sequence[float], sparse: SparseOptions) -> float:
    """About what a preset's own sparse attention saves of a forward, where it is sparse."""
    ascending = sorted(zip((1.0, *keeps), problem.saved, strict=True))
    return problem.n_layers * float(np.interp(sparse.keep or 1.0, *zip(*ascending, strict=True)))
