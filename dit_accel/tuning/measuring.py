"""Measuring: everything that a tuning rests on, each part once, kept on the shelf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel.adapters import find_adapter
from dit_accel.tuning import gains as perturb
from dit_accel.tuning.follow import follow, forwards_of
from dit_accel.tuning.interpose import transformers_of
from dit_accel.tuning.measure import Vectors, forwards, measure
from dit_accel.tuning.plan import Plan
from dit_accel.tuning.problem import bucket_steps
from dit_accel.tuning.runs import Clip, Made, Maker
from dit_accel.tuning.shelf import Shelf
from dit_accel.tuning.tables import Gains, Sample


@dataclass(frozen=True)
class Measured:
    """What was measured."""

    dense: tuple[Made, ...]  # of each held-out clip
    samples: dict[int, list[Sample]]  # of each method, one of each clip to tune on
    gains: Gains
    frames: tuple[np.ndarray, ...]  # of each clip to tune on, dense
    forward_share: float  # of a dense clip's time

    @property
    def pixels(self) -> float:
        """Mean squared error of the frames (peak 1) over that of the latents."""
        return float(np.median(self.gains.pixels)) if self.gains.pixels else 1.0


class Measurer:
    """Measures what is not on the shelf."""

    def __init__(self, pipe: Any, plan: Plan, maker: Maker, shelf: Shelf, bar: Any) -> None:
        self.pipe, self.plan, self.maker, self.shelf, self.bar = pipe, plan, maker, shelf, bar

    def measure(self) -> Measured:
        """All of it."""
        plan = self.plan
        self._expect(self._dense(0).forwards)
        # before the other clips are made: where nothing can run sparse, this says so
        samples = {i: self._samples(i) for i in range(len(plan.methods))}
        self.bar.set_description("perturbing")
        gains = self.shelf.gains(lambda vectors: self._gains(vectors, samples[0][0].weights))
        dense = tuple(map(self._dense, range(len(plan.held_out))))
        share = float(np.median([made.forward_seconds / made.seconds for made in dense]))
        frames = tuple(self.shelf.frames(sample_name(0, j)) for j in range(len(plan.clips)))
        return Measured(dense, samples, gains, frames, share)

    def _dense(self, number: int) -> Made:
        plan = self.plan
        self.bar.set_description(f"dense {number + 1}/{len(plan.held_out)}")
        return self.shelf.dense(
            number, self.maker.velocities, lambda: self.maker.make(plan.dense, plan.held_out[number], plan.cache)
        )

    def _samples(self, method: int) -> list[Sample]:
        plan = self.plan
        found = []
        for j, clip in enumerate(plan.clips):
            self.bar.set_description(f"measuring {plan.methods[method].method} {j + 1}/{len(plan.clips)}")

            def make(clip: Clip = clip) -> tuple[Sample, Vectors]:
                return self._sample(method, clip)

            found.append(self.shelf.sample(sample_name(method, j), make, method == 0 and j == 0))
        return found

    def _sample(self, method: int, clip: Clip) -> tuple[Sample, Vectors]:
        plan, steps, options = self.plan, self.plan.base.generate.steps, self.plan.methods[method]
        run = lambda: self.maker.frames(plan.dense, clip), lambda: self.bar.update(1)  # makes it, ticks
        sample, vectors = measure(self.pipe, options, plan.keeps, steps, plan.close, *run)
        if plan.follow:
            keep, bucket = plan.keeps[sample.reference], bucket_steps(steps, plan.buckets)
            layers = len(sample.attention)
            sample.followed.extend(follow(self.pipe, options, keep, bucket, layers, vectors, *run))
        return sample, vectors

    def _gains(self, vectors: Vectors, weights: list[float]) -> Gains:
        plan = self.plan
        return perturb.measure_gains(
            self.pipe, vectors, weights, plan.perturbed,
            lambda: self.maker.frames(plan.dense, plan.clips[0]), lambda: self.bar.update(1),
        )  # fmt: skip

    def _expect(self, in_a_run: int) -> None:
        """Tell the bar how many forwards are left, now that those of a run are known."""
        plan = self.plan
        steps = plan.base.generate.steps
        branches = max(1, in_a_run // steps)
        layers = sum(len(find_adapter(t).self_attentions(t)) for t in transformers_of(self.pipe).values())
        of_a_sample = forwards(steps, branches, layers, len(plan.keeps), plan.close)
        if plan.follow:
            of_a_sample += forwards_of(bucket_steps(steps, plan.buckets), layers, branches)
        left = sum(
            of_a_sample
            for i in range(len(plan.methods))
            for j in range(len(plan.clips))
            if not self.shelf.has_sample(sample_name(i, j))
        )
        if not self.shelf.has_gains:
            left += perturb.forwards_of(steps, plan.perturbed, branches)
        held_out, tuned_on = _runs(plan)
        left += in_a_run * (len(plan.held_out) * held_out + len(plan.clips) * tuned_on)
        self.bar.total = self.bar.n + left
        self.bar.refresh()


def _runs(plan: Plan) -> tuple[int, int]:
    """About how many runs of the held-out clips there are in all, and of those tuned on behind measuring.

    Of the former dense ones, a try, fewer steps, the preset that one begins from, each keep and what a cache is beside;
    of the latter a schedule with each method, each keep, thresholds, what is polished and plans that are carried over.
    What a cache runs is shorter.
    """
    keeps = len(plan.keeps)
    caches, polish = (8, plan.polish // 2) if plan.cache else (0, 0)
    carried = 2  # ways to carry plans over
    return 4 + keeps + caches, 1 + len(plan.methods) * (1 + keeps) + caches + polish + carried


def sample_name(method: int, clip: int) -> str:
    """Of a measured run on the shelf."""
    return f"{method}-{clip:03d}"
