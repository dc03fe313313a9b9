"""The weights that are reckoned with are those of the cache that runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_accel.caches.parts.extrapolate import extrapolate
from dit_accel.tuning.predictor import PREDICTORS, coefficients

NOISE = np.array([1.0, 0.98, 0.95, 0.9, 0.82, 0.7, 0.5, 0.2])
BEGINS = np.array([0, 0, 0, 3, 3, 3, 3, 3])  # another transformer from step 3 on


@pytest.mark.parametrize("predictor", PREDICTORS, ids=str)
def test_made_up_steps_are_those_of_the_cache(predictor) -> None:
    rng = np.random.default_rng(0)
    computed = rng.random((20, len(NOISE))) < 0.5
    computed[:, [0, 3]] = True
    velocities = torch.tensor(rng.normal(size=(len(NOISE), 5)), dtype=torch.float32)
    made = coefficients(predictor, computed, NOISE, BEGINS)
    places = NOISE if predictor.over == "noise" else -np.arange(len(NOISE), dtype=float)
    for schedule, weights in zip(computed, made, strict=True):
        seen: list = []
        for step, computes in enumerate(schedule):
            seen = [] if step == BEGINS[step] else seen
            if computes:
                expected = velocities[step]
                seen = [*seen, (places[step], expected)][-(predictor.order + 1) :]
            else:
                expected = extrapolate(seen, places[step], predictor.order)
            got = torch.tensor(weights[step], dtype=torch.float32) @ velocities
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
