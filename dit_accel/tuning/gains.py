"""Gains: runs that go wrong on purpose at one step, to see how far that moves the clip.

Steps before it are replayed from what was recorded, so that such a run costs the steps behind it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel.tuning.interpose import idle, transformers_of, walk
from dit_accel.tuning.measure import Vectors
from dit_accel.tuning.tables import Gains


def perturbed_steps(n: int, count: int) -> list[int]:
    """Where to perturb: densest among the first steps, where gains fall fast; never at step 0, which follows none."""
    last = max(1, round(0.85 * (n - 1)))
    return sorted({max(1, round(step)) for step in np.geomspace(1, last, count)})


def forwards_of(n: int, count: int, branches: int) -> int:
    """How many forwards `measure_gains` runs."""
    return 2 * branches * sum(n - 1 - step for step in perturbed_steps(n, count))


def measure_gains(
    pipe: Any,
    vectors: Vectors,
    weights: list[float],
    count: int,
    make: Callable[[], Any],
    tick: Callable[[], None],
) -> Gains:
    """Perturb at `count` steps, by sparse attention's error and by that of a reuse.

    Args:
        vectors: of a measured run, which `make` makes again.
        weights: the solver's.
    """
    n = len(vectors.velocities)
    found: dict[str, list[float]] = {"sparse": [], "reuse": []}
    pixels, steps = [], perturbed_steps(n, count)
    for step in steps:
        for kind in found:
            before, here = vectors.velocities[step - 1], vectors.velocities[step]
            error = vectors.errors[step] if kind == "sparse" else before - here
            final, frames = _run(pipe, vectors, step, error, make, tick)
            moved = float((final - vectors.final).double().norm())
            found[kind].append(moved / max(abs(weights[step]) * float(error.double().norm()), 1e-30))
            mse = float(np.square((frames.astype(np.float64) - vectors.frames) / 255).mean())
            latents = moved**2 / vectors.final.numel()
            if mse > 0 and latents > 0:
                pixels.append(mse / latents)
    return Gains(steps, **found, pixels=pixels)


def _run(
    pipe: Any, vectors: Vectors, at: int, error: Tensor, make: Callable[[], Any], tick: Callable[[], None]
) -> tuple[Tensor, Any]:
    """The final latents and frames of a run whose velocity is off by `error` at one step."""

    def on_step(step: int, velocity: Tensor) -> Tensor:
        if step > at:
            return velocity
        recorded = vectors.velocities[step] + (error if step == at else 0)
        return recorded.to(velocity.device, velocity.dtype)

    with walk(pipe.scheduler, on_step) as noted, torch.no_grad():
        output = vectors.output.to(pipe._execution_device, next(iter(transformers_of(pipe).values())).dtype)
        with idle(pipe, lambda: noted.steps <= at, output, tick):
            frames = make()
        return noted.final.float().cpu(), frames
