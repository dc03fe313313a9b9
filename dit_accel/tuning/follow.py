"""Follow: one layer sparse in one part of the noise levels, and the run made to its end, which tells what that costs.

What is predicted to first order misjudges early steps most, where an error lays something else out. This does not
predict: it looks. Steps before that part are replayed from what was recorded, those behind it are dense, and nothing is
decoded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.handle import Handle, accelerate
from dit_accel.options import SparseOptions
from dit_accel.planner import Experiment
from dit_accel.tuning.interpose import Finished, idle, transformers_of, walk
from dit_accel.tuning.measure import Vectors


def follow(
    pipe: Any,
    options: SparseOptions,
    keep: float,
    bucket: Sequence[int],
    layers: int,
    vectors: Vectors,
    make: Callable[[], Any],
    tick: Callable[[], None],
) -> list[list[float]]:
    """What each layer alone, sparse in one part of the noise levels, makes of the final latents.

    Args:
        options: sparse ones, without a schedule of their own.
        bucket: the part that each step is in, ascending from 0.
        layers: how many there are.
        vectors: of a measured run, which `make` makes again.
        tick: called behind every forward.

    Returns:
        `[L][B]` squared error.
    """
    with accelerate(pipe, options) as handle:

        def moved(layer: int, part: int) -> float:
            final = _run(pipe, handle, layer, keep, part, bucket, vectors, make, tick)
            return float((final - vectors.final).double().square().sum())

        return [[moved(layer, part) for part in range(max(bucket) + 1)] for layer in range(layers)]


def forwards_of(bucket: Sequence[int], layers: int, branches: int) -> int:
    """How many forwards `follow` runs."""
    return branches * layers * sum(len(bucket) - bucket.index(part) for part in range(max(bucket) + 1))


def _run(
    pipe: Any,
    handle: Handle,
    layer: int,
    keep: float,
    part: int,
    bucket: Sequence[int],
    vectors: Vectors,
    make: Callable[[], Any],
    tick: Callable[[], None],
) -> Tensor:
    """The final latents, with a layer sparse in one part."""
    dense, alone = Experiment(frozenset(), keep), Experiment(frozenset([layer]), keep)
    first, steps = bucket.index(part), len(bucket)

    def on_step(step: int, velocity: Tensor) -> Tensor:
        if step + 1 < steps:
            handle.experiment(alone if bucket[step + 1] == part else dense)
        return velocity if step >= first else vectors.velocities[step].to(velocity.device, velocity.dtype)

    handle.experiment(alone if part == 0 else dense)
    output = vectors.output.to(pipe._execution_device, next(iter(transformers_of(pipe).values())).dtype)
    with walk(pipe.scheduler, on_step, steps) as noted, torch.no_grad():
        with idle(pipe, lambda: noted.steps < first, output, tick), contextlib.suppress(Finished):
            make()
    return noted.final.float().cpu()
