"""How far a student's velocity is from the dense teacher's, noise level by noise level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.training.draws import Batch, generator
from dit_accel.training.samples import LatentFolder

Velocity = Callable[[dict[str, Any]], Tensor]  # of a forward's arguments


@dataclass(frozen=True)
class VelocityError:
    """Sums of squares over the velocities, for each noise level: `|student - teacher|^2 / |teacher|^2`."""

    levels: tuple[tuple[float, float], ...]  # (sigma, relative squared error)
    overall: float

    def to_dict(self) -> dict[str, Any]:
        return {"overall": self.overall, "levels": [{"sigma": s, "error": e} for s, e in self.levels]}


@dataclass(frozen=True)
class Case:
    """One comparison: the number of its noise level, and the forward's arguments."""

    level: int
    inputs: dict[str, Any]


def make_cases(
    folder: LatentFolder,
    places: Sequence[int],
    levels: Sequence[tuple[float, float]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Iterator[Case]:
    """Every sample at every noise level with every branch of guidance; the same noise at each call.

    Args:
        places: of the folder's samples.
        levels: (sigma, timestep).
        dtype: of the transformer's inputs.
        seed: of the noise.
    """
    for place in places:
        sample = folder.read(place)
        noise = torch.randn(sample.latents.shape, generator=generator(seed, "held out", place))
        for number, (sigma, timestep) in enumerate(levels):
            for condition in sample.conditions:
                told = torch.tensor([sigma]), torch.tensor([timestep])
                batch = Batch(sample.latents, noise, *told, dict(condition))
                yield Case(number, batch.inputs(device, dtype))


@torch.no_grad()
def measure_velocity(
    cases: Iterable[Case],
    student: Velocity,
    teacher: Velocity,
    levels: Sequence[tuple[float, float]],
    *,
    device: torch.device,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> VelocityError:
    """Compare velocities.

    Args:
        cases: of `make_cases`, for these levels; those of this process.
        student, teacher: give the velocity of a forward's arguments.
        total: sums a tensor over processes.
    """
    sums = torch.zeros(len(levels), 2, dtype=torch.float64, device=device)
    for case in cases:
        aim, given = teacher(case.inputs).double(), student(case.inputs).double()
        sums[case.level, 0] += (given - aim).square().sum()
        sums[case.level, 1] += aim.square().sum()
    sums = total(sums).cpu()
    share = [(error / norm).item() if norm > 0 else 0.0 for error, norm in sums]
    overall = (sums[:, 0].sum() / sums[:, 1].sum()).item() if sums[:, 1].sum() > 0 else 0.0
    return VelocityError(tuple((sigma, e) for (sigma, _), e in zip(levels, share, strict=True)), overall)


def measure_aims(
    cases: Iterable[Case],
    student: Velocity,
    aims: Iterable[Tensor],
    levels: Sequence[tuple[float, float]],
    *,
    device: torch.device,
) -> VelocityError:
    """`measure_velocity` against velocities that are there already, one for each case in its order."""
    waiting = iter(aims)
    return measure_velocity(cases, student, lambda _: next(waiting).to(device), levels, device=device)
