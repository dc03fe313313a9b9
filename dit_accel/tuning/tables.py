"""Tables: what measuring leaves behind. Plain numbers, kept as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.errors import UsageError
from dit_accel.pipelines.staging import Stage


@dataclass(frozen=True)
class Sample:
    """One dense run of a prompt, measured. n steps, L layers, K keeps (the largest first).

    Errors are squared. "Of the velocity" means of what the scheduler is given, all branches of guidance together.
    """

    noise: list[float]  # [n] noise level of each step
    roles: list[str]  # [n] which transformer ran it
    attention: list[list[list[float]]]  # [L][n][K] relative error of a layer's attention; the mean of the branches
    steps: list[int]  # [D] the steps that were looked at closely
    alone: list[list[float]]  # [D][L] of the velocity, with one layer sparse at the smallest keep
    together: list[list[float]]  # [D][K] of the velocity, with every layer sparse
    reference: int  # which keep `gram` was measured at
    # [2n][2n] products of the velocities v_0 ... v_{n-1} and the errors e_0 ... that every layer sparse makes of them
    gram: list[list[float]]
    weights: list[float]  # [n] how much the final latents move with a step's velocity: the solver's own share
    elements: int  # of the latents
    dense_seconds: list[float]  # of forwards at the steps looked at closely
    sparse_seconds: list[list[float]]  # [K][...] of the same forwards with every layer sparse
    # [n] the error that a cache expects of a step held from the one before; None where it cannot tell
    expected: list[float | None]
    # [L][B] squared error of the final latents, with one layer sparse at the reference keep in one part of the noise
    # levels; empty where it was not followed to the end (`follow.py`)
    followed: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Gains:
    """How much more an error of a step's velocity moves the final latents than the solver's weight says.

    The model answers an error: it mends one part of it at later steps, and lays something else out where the error
    came early.
    """

    steps: list[int]  # where it was measured
    sparse: list[float]  # for the error of sparse attention
    reuse: list[float]  # for the velocity of the step before in place of this step's
    # of pixels over latents: mean squared error of the frames (peak 1) over that of the final latents
    pixels: list[float]


def write(path: Path, table: Any) -> None:
    """Write a table atomically."""
    with Stage() as stage:
        stage.write_text(path, json.dumps(dataclasses.asdict(table)) + "\n")


def read(path: Path, kind: type) -> Any:
    """Read a table.

    Raises:
        UsageError: it is damaged.
    """
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"measurement {path} cannot be read ({error}): remove it and measure again") from None
