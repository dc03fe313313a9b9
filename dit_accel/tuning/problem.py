"""Problem: what is known of error and time, in the form in which it is shared out. Pure arithmetic, no torch.

An allocation says of each step whether it is computed, and of each layer in each bucket (a run of neighbouring steps)
at which keep. Its error is that of the final latents, to first order: the sum over steps of

    solver's weight x gain x (velocity it would have had - dense velocity)

as vectors, of which only the products with one another are needed (`Sample.gram`): errors of neighbouring steps look
alike, and add up where independent ones would not. A made-up step has a combination of the velocities computed last
(`predictor.py`), with the same of sparse attention's errors there. The direction of those is the measured one; their
length follows the layers' shares, whose squares are taken to add up. Where layers were followed to the end of their
clips (`follow.py`), sparse attention's errors are those that were found there, and squares of all of them add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dit_accel.tuning.predictor import HOLD, Predictor, coefficients
from dit_accel.tuning.tables import Gains, Sample
from dit_accel.tuning.threshold import steps_under, thresholds_of

_NOTHING = 1e-12  # mean squared error below which nothing is wrong


@dataclass(frozen=True)
class Allocation:
    """Which steps are computed, and how much each layer reads in each bucket.

    `keeps` are places in a problem's list of keeps, 0 being dense.
    """

    computed: tuple[bool, ...]  # [n]; the first is
    keeps: tuple[tuple[int, ...], ...]  # [L][B]
    predictor: Predictor = HOLD  # of the steps between
    threshold: float | None = None  # a cache decides by it which steps are computed, in place of `computed`
    most: int | None = None  # steps in a row that this cache makes up at most; None: as many as there are


@dataclass(frozen=True)
class Problem:
    """S samples, n steps, L layers, B buckets, K keeps and dense attention before them."""

    # [S, L, n, 1 + K] squared error by a layer at a keep, as a share of what `gram`'s errors are; 0 for dense
    shares: np.ndarray
    gram: np.ndarray  # [S, 2n, 2n] of velocities and errors
    reuse: np.ndarray  # [n] weight times gain of an error by reuse
    sparse: np.ndarray  # [n] the same of an error by sparse attention
    bucket: np.ndarray  # [n] int
    forced: np.ndarray  # [n] bool: steps that must be computed
    saved: np.ndarray  # [1 + K] share of a forward's time that one layer saves
    step_cost: float  # a dense step's share of a dense run's time; n of them and what is left make 1
    elements: int  # of the latents
    noise: np.ndarray  # [n] noise level of each step
    begins: np.ndarray  # [n] int: the first step of the transformer that runs a step
    predictor: Predictor = HOLD  # how steps are made up now
    expected: np.ndarray | None = None  # [S, n] what a cache expects of each step held, inf where it cannot tell
    threshold: float | None = None  # a cache decides by it now
    most: int | None = None  # steps in a row that a cache with a threshold makes up at most
    schedules: np.ndarray | None = None  # bool [S, n] the steps that it computes of each sample
    # `shares` and `gram` by which `loss` goes where layers were followed to the end; None: the same as above
    ends: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def n_steps(self) -> int:
        return len(self.bucket)

    @property
    def n_layers(self) -> int:
        return self.shares.shape[1]

    @property
    def n_buckets(self) -> int:
        return int(self.bucket.max()) + 1

    def dense(self) -> Allocation:
        """The allocation that leaves everything as it is."""
        keeps = ((0,) * self.n_buckets,) * self.n_layers
        return Allocation((True,) * self.n_steps, keeps, self.predictor, self.threshold, self.most)

    def made_up_by(self, predictor: Predictor) -> Problem:
        """The same, with steps made up in another way."""
        return replace(self, predictor=predictor)

    def under(self, threshold: float) -> Problem:
        """The same, with a cache that decides by a threshold which steps are computed: no move changes them."""
        schedules = np.array([steps_under(one, threshold, self.most) for one in self.expected])
        forced = np.ones_like(self.forced)
        return replace(self, threshold=threshold, schedules=schedules, forced=forced, predictor=HOLD)

    def thresholds(self) -> list[float]:
        """Those that differ, the largest first; none where a cache could not tell what to expect."""
        if self.expected is None:
            return []
        told = [[None if np.isinf(x) else float(x) for x in one] for one in self.expected]
        return thresholds_of(told, self.most)

    def cost(self, allocation: Allocation) -> float:
        """Time as a share of a dense run's; where a cache decides, the mean over samples."""
        return float(self._as_in(allocation).costs(*_as_arrays(allocation))[0])

    def loss(self, allocation: Allocation) -> float:
        """Mean squared error of the final latents; over samples the geometric mean, as PSNR is averaged."""
        return float(self._as_in(allocation).losses(*_as_arrays(allocation))[0])

    def _as_in(self, allocation: Allocation) -> Problem:
        if allocation.threshold is not None:
            if (allocation.threshold, allocation.most) == (self.threshold, self.most):
                return self
            return replace(self, most=allocation.most).under(allocation.threshold)
        return self.made_up_by(allocation.predictor)

    def _computed(self, computed: np.ndarray) -> list[np.ndarray]:
        """Of each sample, bool [M or 1, n]: a cache's schedule in place of what is said of all."""
        if self.schedules is None:
            return [computed] * len(self.gram)
        return [one[None] for one in self.schedules]

    def costs(self, computed: np.ndarray, keeps: np.ndarray) -> np.ndarray:
        """`cost` of many, [M]. computed: bool [M, n]; keeps: int [M, L, B]."""
        saved = self.saved[keeps].sum(1)[:, self.bucket]  # [M, n]
        skipped = [np.where(one, saved, 1).sum(1) for one in self._computed(computed)]
        return 1 - self.step_cost * np.mean(skipped, 0)

    def losses(self, computed: np.ndarray, keeps: np.ndarray) -> np.ndarray:
        """`loss` of many, [M]. computed: bool [M, n]; keeps: int [M, L, B]."""
        shares, grams = self.ends or (self.shares, self.gram)
        logs = np.zeros(len(keeps))
        for made, gram, length in zip(self._made(computed), grams, self._lengths(shares, keeps), strict=True):
            errors = length * (self.sparse @ made)  # [M, n]
            velocity = np.broadcast_to(self.reuse @ made - self.reuse, errors.shape)
            vectors = np.concatenate([velocity, errors], 1)
            logs += np.log(np.maximum((vectors @ gram * vectors).sum(1) / self.elements, _NOTHING))
        mean = np.exp(logs / len(grams))
        return np.where(mean > 2 * _NOTHING, mean, 0.0)

    def _made(self, computed: np.ndarray) -> list[np.ndarray]:
        """Of each sample, `coefficients` [M or 1, n, n]."""
        if self.schedules is None:
            return [coefficients(self.predictor, computed, self.noise, self.begins)] * len(self.gram)
        return [coefficients(self.predictor, one[None], self.noise, self.begins) for one in self.schedules]

    def _lengths(self, shares: np.ndarray, keeps: np.ndarray) -> np.ndarray:
        """[S, M, n] by what factor the measured errors of sparse attention are to be taken."""
        places = keeps[:, :, self.bucket]  # [M, L, n]
        layers = np.arange(self.n_layers)[:, None]
        return np.sqrt(shares[:, layers, np.arange(self.n_steps), places].sum(2))

    def velocity_error(self, allocation: Allocation) -> float:
        """Root mean square over samples and steps of the relative error of the velocity."""
        computed, keeps = _as_arrays(allocation)
        lengths, n = self._lengths(self.shares, keeps)[:, 0], self.n_steps
        total = 0.0
        for made, gram, length in zip(self._as_in(allocation)._made(computed), self.gram, lengths, strict=True):
            made = made[0]
            vectors = np.concatenate([made - np.eye(n), made * length], 1)  # [n, 2n]
            total += float((((vectors @ gram) * vectors).sum(1) / np.diag(gram)[:n]).mean())
        return float(np.sqrt(max(total, 0.0) / len(self.gram)))


def _as_arrays(allocation: Allocation) -> tuple[np.ndarray, np.ndarray]:
    return np.array(allocation.computed)[None], np.array(allocation.keeps)[None]


def make_problem(samples: Sequence[Sample], gains: Gains, buckets: int, forward_share: float) -> Problem:
    """Bring measurements into that form.

    Args:
        samples: of runs with the same settings.
        buckets: into how many runs of neighbouring steps to divide them.
        forward_share: of a dense run's time that its forwards take.
    """
    first = samples[0]
    n = len(first.noise)
    places, bucket = np.arange(n), np.array(bucket_steps(n, buckets))
    weights = np.array(first.weights)
    gain = {kind: _between(places, gains.steps, getattr(gains, kind)) for kind in ("sparse", "reuse")}
    forced = np.array([i == 0 or first.roles[i] != first.roles[i - 1] for i in places])
    begins = np.maximum.accumulate(np.where(forced, places, 0))
    shares = np.stack([layer_shares(sample) for sample in samples])
    sparse, ends = weights * gain["sparse"], None
    if all(sample.followed for sample in samples):
        found = [_followed(*pair, sparse, bucket) for pair in zip(samples, shares, strict=True)]
        ends = np.stack([one for one, _ in found]), np.stack([one for _, one in found])
    return Problem(
        shares=shares,
        gram=np.stack([np.array(sample.gram) for sample in samples]),
        reuse=weights * gain["reuse"],
        sparse=sparse,
        bucket=bucket,
        forced=forced,
        saved=np.concatenate([[0.0], saved_by_layer(samples)]),
        step_cost=forward_share / n,
        elements=first.elements,
        noise=np.array(first.noise),
        begins=begins,
        expected=np.array([[np.inf if x is None else x for x in sample.expected] for sample in samples]),
        ends=ends,
    )


def bucket_steps(n: int, buckets: int) -> list[int]:
    """The part of the noise levels that each of n steps is in: as many steps in each as can be."""
    return [step * min(buckets, n) // n for step in range(n)]


def _followed(
    sample: Sample, shares: np.ndarray, sparse: np.ndarray, bucket: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shares and products that come to what was found at the end, each layer alone in one bucket, where all add up.

    Args:
        shares: [L, n, 1 + K] of the velocity's error.
        sparse: [n] `Problem.sparse`.
    """
    gram, n = np.array(sample.gram), len(bucket)
    apart = np.zeros_like(gram)  # errors of different steps, and those of steps made up, are not alike in any way
    apart[:n, :n] = gram[:n, :n]
    errors = np.diag(gram)[n:]
    apart[n:, n:] = np.diag(errors)
    told = sparse**2 * errors * shares[:, :, 1 + sample.reference]  # [L, n]
    in_bucket = told @ np.eye(bucket.max() + 1)[bucket]  # [L, B]
    factors = np.array(sample.followed) / np.maximum(in_bucket, 1e-30)
    return shares * factors[:, bucket, None], apart


def _between(places: np.ndarray, steps: Sequence[int], values: Sequence[float]) -> np.ndarray:
    """Gains at every step: between two where they were measured the larger, for they fall in jumps."""
    at = np.searchsorted(steps, places)
    above, below = np.minimum(at, len(steps) - 1), np.maximum(at - 1, 0)
    exact = np.asarray(steps)[above] == places
    values = np.asarray(values)
    return np.where(exact, values[above], np.maximum(values[above], values[below]))


def layer_shares(sample: Sample) -> np.ndarray:
    """[L, n, 1 + K] squared error of the velocity by each layer, as a share of all layers' at the reference keep.

    How much a layer's own error moves the velocity is known at the steps looked at closely, and taken from the nearest
    of them elsewhere.
    """
    attention = np.array(sample.attention)  # [L, n, K]
    n, steps = attention.shape[1], np.array(sample.steps)
    alone = np.array(sample.alone)  # [D, L]
    passed = alone / np.maximum(attention[:, steps, -1].T, 1e-30)  # [D, L] velocity's error by attention's
    nearest = np.abs(steps[None] - np.arange(n)[:, None]).argmin(1)
    moved = attention * passed[nearest].T[:, :, None]  # [L, n, K]
    moved = moved / np.maximum(moved[:, :, sample.reference].sum(0), 1e-30)[None, :, None]
    return np.concatenate([np.zeros_like(moved[..., :1]), moved], -1)


def saved_by_layer(samples: Sequence[Sample]) -> np.ndarray:
    """[K] share of a forward's time that one sparse layer saves; below 0 where sparse is slower."""
    ratios = [np.array(sample.sparse_seconds) / np.array(sample.dense_seconds) for sample in samples]  # [K, ...]
    layers = len(samples[0].attention)
    return (1 - np.median(np.concatenate(ratios, 1), 1)) / layers


def additivity(samples: Sequence[Sample]) -> list[float]:
    """Squared errors of single layers added up, over that of all of them together, at each step looked at closely.

    1 where errors of layers are independent, as allocating them takes for granted.
    """
    return [
        sum(alone) / max(together[-1], 1e-30)
        for sample in samples
        for alone, together in zip(sample.alone, sample.together, strict=True)
    ]
