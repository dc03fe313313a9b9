"""Problem: what is known of error and time, in the form in which it is shared out. Pure arithmetic, no torch.

An allocation says of each step whether it is computed, and of each layer in each bucket (a run of neighbouring steps)
at which keep. Its error is that of the final latents, to first order: the sum over steps of

    solver's weight x gain x (velocity it would have had - dense velocity)

as vectors, of which only the products with one another are needed (`Sample.gram`): errors of neighbouring steps look
alike, and add up where independent ones would not. A made-up step has a combination of the velocities computed last
(`predictor.py`), with the same of sparse attention's errors there. The direction of those is the measured one; their
length follows the layers' shares, whose squares are taken to add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dit_accel.tuning.predictor import HOLD, Predictor, coefficients
from dit_accel.tuning.tables import Gains, Sample


@dataclass(frozen=True)
class Allocation:
    """Which steps are computed, and how much each layer reads in each bucket.

    `keeps` are places in a problem's list of keeps, 0 being dense.
    """

    computed: tuple[bool, ...]  # [n]; the first is
    keeps: tuple[tuple[int, ...], ...]  # [L][B]
    predictor: Predictor = HOLD  # of the steps between


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
        return Allocation((True,) * self.n_steps, ((0,) * self.n_buckets,) * self.n_layers, self.predictor)

    def made_up_by(self, predictor: Predictor) -> Problem:
        """The same, with steps made up in another way."""
        return replace(self, predictor=predictor)

    def cost(self, allocation: Allocation) -> float:
        """Time as a share of a dense run's."""
        return float(self.costs(*_as_arrays(allocation))[0])

    def loss(self, allocation: Allocation) -> float:
        """Mean squared error of the final latents, over samples."""
        return float(self.made_up_by(allocation.predictor).losses(*_as_arrays(allocation))[0])

    def costs(self, computed: np.ndarray, keeps: np.ndarray) -> np.ndarray:
        """`cost` of many, [M]. computed: bool [M, n]; keeps: int [M, L, B]."""
        saved = self.saved[keeps].sum(1)[:, self.bucket]  # [M, n]
        return 1 - self.step_cost * np.where(computed, saved, 1).sum(1)

    def losses(self, computed: np.ndarray, keeps: np.ndarray) -> np.ndarray:
        """`loss` of many, [M]. computed: bool [M, n]; keeps: int [M, L, B]."""
        made = coefficients(self.predictor, computed, self.noise, self.begins)
        velocity = self.reuse @ made - self.reuse
        errors = self._lengths(keeps) * (self.sparse @ made)  # [S, M, n]
        vectors = np.concatenate([np.broadcast_to(velocity, errors.shape), errors], 2)
        squared = (vectors @ self.gram * vectors).sum(2)
        return np.maximum(squared.mean(0), 0) / self.elements

    def _lengths(self, keeps: np.ndarray) -> np.ndarray:
        """[S, M, n] by what factor the measured errors of sparse attention are to be taken."""
        places = keeps[:, :, self.bucket]  # [M, L, n]
        layers = np.arange(self.n_layers)[:, None]
        return np.sqrt(self.shares[:, layers, np.arange(self.n_steps), places].sum(2))

    def velocity_error(self, allocation: Allocation) -> float:
        """Root mean square over samples and steps of the relative error of the velocity."""
        computed, keeps = _as_arrays(allocation)
        lengths, n = self._lengths(keeps)[:, 0], self.n_steps
        made = coefficients(allocation.predictor, computed, self.noise, self.begins)[0]
        total = 0.0
        for gram, length in zip(self.gram, lengths, strict=True):
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
    places = np.arange(n)
    weights = np.array(first.weights)
    gain = {kind: _between(places, gains.steps, getattr(gains, kind)) for kind in ("sparse", "reuse")}
    forced = np.array([i == 0 or first.roles[i] != first.roles[i - 1] for i in places])
    begins = np.maximum.accumulate(np.where(forced, places, 0))
    return Problem(
        shares=np.stack([layer_shares(sample) for sample in samples]),
        gram=np.stack([np.array(sample.gram) for sample in samples]),
        reuse=weights * gain["reuse"],
        sparse=weights * gain["sparse"],
        bucket=places * min(buckets, n) // n,
        forced=forced,
        saved=np.concatenate([[0.0], saved_by_layer(samples)]),
        step_cost=forward_share / n,
        elements=first.elements,
        noise=np.array(first.noise),
        begins=begins,
    )


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
