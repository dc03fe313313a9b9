"""Follow: one layer sparse in one part of the noise levels, and the run made to its end, which tells what that costs.

What is predicted to first order misjudges early steps most, where an error lays something else out. This does not
predict: it looks. Steps before that part are replayed from what was recorded, those behind it are dense, and nothing is
decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dit_accel.handle import accelerate
from dit_accel.options import SparseOptions
from dit_accel.planner import Experiment
from dit_accel.tuning.measure import Vectors
from dit_accel.tuning.replay import replay


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
    dense, steps = Experiment(frozenset(), keep), len(bucket)
    with accelerate(pipe, options) as handle:

        def moved(layer: int, part: int) -> float:
            alone = Experiment(frozenset([layer]), keep)

            def set_out(step: int) -> None:
                handle.experiment(alone if step < steps and bucket[step] == part else dense)

            set_out(0)
            given = vectors.velocities[: bucket.index(part)]
            final, _ = replay(pipe, given, vectors.output, make, tick, set_out, steps)
            return float((final - vectors.final).double().square().sum())

        return [[moved(layer, part) for part in range(max(bucket) + 1)] for layer in range(layers)]


def forwards_of(bucket: Sequence[int], layers: int, branches: int) -> int:
    """How many forwards `follow` runs."""
    return branches * layers * sum(len(bucket) - bucket.index(part) for part in range(max(bucket) + 1))
