"""Problems that are drawn, and those whose numbers are given."""

from __future__ import annotations

import numpy as np

from dit_accel.tuning.problem import Problem


def make(
    shares: np.ndarray, gram: np.ndarray, *, weights: np.ndarray, bucket: list[int], saved: list[float]
) -> Problem:
    """Shares [L, n, 1 + K] and gram [2n, 2n] of one sample; forwards are all of the time."""
    n = len(bucket)
    return Problem(
        shares=shares[None],
        gram=gram[None],
        reuse=weights,
        sparse=weights,
        bucket=np.array(bucket),
        forced=np.arange(n) == 0,
        saved=np.array(saved),
        step_cost=1 / n,
        elements=1,
        noise=np.linspace(1, 0.1, n),
        begins=np.zeros(n, int),
    )


def draw(seed: int, n: int, layers: int, buckets: int, keeps: int) -> Problem:
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.normal(size=(n, 6)), 0)  # velocities that change from step to step
    vectors = np.concatenate([path, 0.3 * rng.normal(size=(n, 6))])
    shares = np.sort(rng.exponential(size=(layers, n, keeps + 1)) ** 2, -1)
    shares[..., 0] = 0
    bucket = [step * buckets // n for step in range(n)]
    saved = [0.0, *(np.arange(1, keeps + 1) * 0.6 / keeps / layers)]
    return make(shares, vectors @ vectors.T, weights=rng.uniform(0.1, 1, n), bucket=bucket, saved=saved)
