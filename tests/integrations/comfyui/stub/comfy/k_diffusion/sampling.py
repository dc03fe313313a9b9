"""Samplers. Each is given a model that takes the noise away at a level."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor


def sample_euler(model: Any, x: Tensor, sigmas: Tensor, s_churn: float = 0.0) -> Tensor:
    for now, then in itertools.pairwise(sigmas):
        x = x + (x - model(x, now)) / now * (then - now)
    return x


def sample_heun(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """It looks twice at most levels."""
    for now, then in itertools.pairwise(sigmas):
        slope = (x - model(x, now)) / now
        ahead = x + slope * (then - now)
        if then > 0:
            slope = (slope + (ahead - model(ahead, then)) / then) / 2
        x = x + slope * (then - now)
    return x


def sample_dpmpp_2m(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """It looks back at the level before."""
    before = None
    for now, then in itertools.pairwise(sigmas):
        clean = model(x, now)
        ahead = clean if before is None or then == 0 else 1.5 * clean - 0.5 * before
        x, before = then / now * x + (1 - then / now) * ahead, clean
    return x
