"""Gains: runs that go wrong on purpose at one step, to see how far that moves the clip.

Steps before it are replayed from what was recorded, so that such a run costs the steps behind it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dit_accel.tuning.measure import Vectors
from dit_accel.tuning.replay import replay
from dit_accel.tuning.tables import Gains


def perturbed_steps(n: int, count: int) -> list[int]:
    """Where to perturb: at step 0, and densest among the first behind it, where gains fall fast."""
    last = max(1, round(0.85 * (n - 1)))
    return [0, *sorted({max(1, round(step)) for step in np.geomspace(1, last, count)})]


def forwards_of(n: int, count: int, branches: int) -> int:
    """How many forwards `measure_gains` runs."""
    return branches * sum(len(_kinds(step)) * (n - 1 - step) for step in perturbed_steps(n, count))


def _kinds(step: int) -> tuple[str, ...]:
    """The errors of a step: the first follows none that it could be held from."""
    return ("sparse", "reuse") if step else ("sparse",)


def measure_gains(
    pipe: Any,
    vectors: Vectors,
    weights: list[float],
    count: int,
    make: Callable[[], Any],
    tick: Callable[[], None],
) -> Gains:
    """Perturb at the first step and `count` others, by sparse attention's error and by that of a reuse.

    Args:
        vectors: of a measured run, which `make` makes again.
        weights: the solver's.
    """
    n = len(vectors.velocities)
    found: dict[str, list[float]] = {"sparse": [], "reuse": []}
    pixels, steps = [], perturbed_steps(n, count)
    for step in steps:
        for kind in _kinds(step):
            here = vectors.velocities[step]
            error = vectors.errors[step] if kind == "sparse" else vectors.velocities[step - 1] - here
            final, frames = replay(pipe, [*vectors.velocities[:step], here + error], vectors.output, make, tick)
            moved = float((final - vectors.final).double().norm())
            found[kind].append(moved / max(abs(weights[step]) * float(error.double().norm()), 1e-30))
            mse = float(np.square((frames.astype(np.float64) - vectors.frames) / 255).mean())
            latents = moved**2 / vectors.final.numel()
            if mse > 0 and latents > 0:
                pixels.append(mse / latents)
    found["reuse"].insert(0, found["reuse"][0])  # of the first step, which is never made up
    return Gains(steps, **found, pixels=pixels)
