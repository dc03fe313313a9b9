"""Replay: a run whose first steps are given their velocities, so that it costs the steps behind them alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.tuning.interpose import Finished, idle, transformers_of, walk


def replay(
    pipe: Any,
    given: Sequence[Tensor],
    output: Tensor,
    make: Callable[[], Any],
    tick: Callable[[], None],
    before: Callable[[int], None] = lambda step: None,
    steps: int | None = None,
) -> tuple[Tensor, Any]:
    """Make a clip that goes on from given velocities.

    Args:
        given: what the scheduler gets at the first steps, in place of what the transformers would make.
        output: what a transformer gives, for its shape.
        tick: called behind every forward that is computed.
        before: called with the number of a step before its forwards, from the second step on.
        steps: behind so many the run ends and nothing is decoded; None: it ends by itself.

    Returns:
        The final latents, fp32 in main memory, and what `make` gave; None where the run was ended.
    """

    def on_step(step: int, velocity: Tensor) -> Tensor:
        before(step + 1)
        return given[step].to(velocity.device, velocity.dtype) if step < len(given) else velocity

    made = None
    output = output.to(pipe._execution_device, next(iter(transformers_of(pipe).values())).dtype)
    with walk(pipe.scheduler, on_step, steps) as noted, torch.no_grad():
        with idle(pipe, lambda: noted.steps < len(given), output, tick), contextlib.suppress(Finished):
            made = make()
    return noted.final.float().cpu(), made
