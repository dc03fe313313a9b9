"""What is drawn in training: the order of samples, branches, noise levels, noise.

Every draw is a function of the seed and of its place (step, micro-batch, rank, row), and of nothing else. So a run that
is gone on with sees what an uninterrupted one would have, and no state of a random generator is to be kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import unknown_name
from dit_accel.training.guidance import Guidance
from dit_accel.training.samples import LatentFolder, Schedule, join_rows

NOISES = ("schedule", "lognormal")
LOG_MEAN, LOG_DEVIATION = 1.5, 1.6  # of sigma / (1 - sigma), as published for SLA's fine-tuning


@dataclass(frozen=True)
class Batch:
    """Latents `[B, ...]` and noise, level and timestep `[B]`, all fp32; and the forward's other arguments."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    timestep: Tensor
    arguments: dict

    @property
    def noisy(self) -> Tensor:
        """`(1 - sigma) x_0 + sigma noise`, fp32."""
        sigma = self.sigma.view(-1, *[1] * (self.latents.ndim - 1))
        return (1 - sigma) * self.latents + sigma * self.noise

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict:
        """The forward's arguments on a device.

        Latents and what each row has of its own (embeddings, but no bare numbers such as guidance) come in `dtype`,
        the transformer's: the samples may have been made in another.
        """

        def move(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            own = value.is_floating_point() and value.ndim > 1 and len(value) == len(self.latents)
            return value.to(device, dtype if own else None)

        return {
            **{name: move(value) for name, value in self.arguments.items()},
            "hidden_states": self.noisy.to(device, dtype),
            "timestep": self.timestep.to(device),
            "return_dict": False,
        }


def generator(*place: object) -> torch.Generator:
    """A generator on the CPU for a place, the same on every machine."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Draws:
    """Batches by step.

    Args:
        folder: the samples.
        places: those of its samples that are used, by place.
        batch: samples on each rank.
        accumulate: micro-batches of a step.
        noise: "schedule", where the pipeline samples; or "lognormal", as published.
        role: which of the pipeline's transformers; it is given its own noise levels alone.
        below: the highest noise level to draw.
        guidance: with it each sample is two rows, both branches at one x_t, the conditional one first; without, one
            row of a branch that is drawn. Samples, noise and levels are the same.

    Raises:
        UsageError: no noise level is left.
    """

    def __init__(
        self,
        folder: LatentFolder,
        places: range,
        *,
        batch: int,
        accumulate: int,
        noise: str,
        seed: int,
        role: str = "transformer",
        below: float = 1.0,
        guidance: Guidance | None = None,
    ) -> None:
        if noise not in NOISES:
            raise unknown_name("distribution of noise levels", noise, NOISES)
        self.folder, self.places, self.batch, self.accumulate = folder, places, batch, accumulate
        self.noise, self.seed, self.role = noise, seed, role
        self.below, self.guidance = below, guidance
        self.schedule = folder.index.part(role).below(below)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def draw(self, step: int, micro: int, rank: int, world: int) -> Batch:
        """The batch of one rank, in one micro-batch of a step."""
        first = ((step * self.accumulate + micro) * world + rank) * self.batch
        rows, levels, noises = [], [], []
        for place in range(first, first + self.batch):
            sample = self.folder.read(self._sample(place))
            chance = generator(self.seed, "row", place)
            branch = int(torch.randint(len(sample.conditions), (), generator=chance))
            level = self._level(chance)
            noise = torch.randn(sample.latents.shape, generator=chance)
            chosen = [sample.conditions[branch]] if self.guidance is None else self.guidance.pair(sample.conditions)
            for condition in chosen:
                levels.append(level)
                noises.append(noise)
                rows.append((sample.latents, condition))
        latents, arguments = join_rows(rows)
        sigma, timestep = (torch.tensor(values) for values in zip(*levels, strict=True))
        return Batch(latents, torch.cat(noises), sigma, timestep, arguments)

    def _sample(self, place: int) -> int:
        epoch, within = divmod(place, len(self.places))
        if self._epoch[0] != epoch:
            order = torch.randperm(len(self.places), generator=generator(self.seed, "epoch", epoch))
            self._epoch = (epoch, order.tolist())
        return self.places[self._epoch[1][within]]

    def _level(self, chance: torch.Generator) -> tuple[float, float]:
        schedule = self.schedule
        if self.noise == "schedule":
            which = int(torch.randint(len(schedule.sigmas), (), generator=chance))
            return schedule.sigmas[which], schedule.timesteps[which]
        while True:
            log = LOG_MEAN + LOG_DEVIATION * torch.randn((), generator=chance)
            sigma = float(torch.sigmoid(log))  # that of x_0 + s noise is s / (1 + s)
            if sigma <= self.below and self.folder.index.is_own(self.role, sigma * schedule.scale):
                return sigma, sigma * schedule.scale


def spread_levels(schedule: Schedule, count: int) -> list[tuple[float, float]]:
    """So many (sigma, timestep) of a schedule, evenly over its steps, first and last included."""
    last = len(schedule.sigmas) - 1
    count = min(count, last + 1)
    places = [round(i * last / max(count - 1, 1)) for i in range(count)]
    return [(schedule.sigmas[i], schedule.timesteps[i]) for i in dict.fromkeys(places)]
