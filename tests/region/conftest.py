"""A pipeline that is stepped by hand: forwards of every branch, guidance, and the scheduler's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.testing import tiny_wan_inputs, tiny_wan_pipeline

GRID = (3, 4, 6)  # 72 tokens, no two edges alike


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Equal to the bit from run to run."""


class Rig:
    """A Wan pipeline's transformer and scheduler.

    Args:
        batch: rows of the latents.
        transformer: arguments of `tiny_wan_transformer`.
    """

    def __init__(self, batch: int = 1, steps: int = 6, **transformer: Any) -> None:
        self.pipe = tiny_wan_pipeline(transformer=transformer)
        self.transformer, self.batch, self.steps = self.pipe.transformer, batch, steps
        self.inputs = tiny_wan_inputs(self.transformer, GRID, batch=batch)
        text = self.inputs.pop("encoder_hidden_states")
        self.text = {"cond": text, "uncond": -text}
        self.x = self.inputs.pop("hidden_states")
        self.tokens = 3 * 4 * 6
        self.begin()

    def begin(self) -> None:
        self.pipe.scheduler.set_timesteps(self.steps)

    def accelerate(self, **region: Any) -> dit_accel.Handle:
        own = {"sample_ratio": 0.5, "bucket": 4, "start": 1, "error_reset": ()}
        return dit_accel.accelerate(self.pipe, region={**own, **region})

    def forward(self, x: Tensor, time: float = 500.0, branch: str = "cond", **more: Any) -> Tensor:
        given = {**self.inputs, "timestep": torch.full((self.batch,), time), **more}
        with torch.no_grad(), self.transformer.cache_context(branch):
            text = self.text[branch]
            return self.transformer(hidden_states=x, encoder_hidden_states=text, **given, return_dict=False)[0]

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        """The scheduler's step, with the channels that it moves."""
        scheduler = self.pipe.scheduler
        index = scheduler.step_index or 0
        return scheduler.step(velocity, scheduler.timesteps[index], x[:, :16], return_dict=False)[0]

    def by_token(self, latents: Tensor) -> Tensor:
        """`[B, C, F, H, W]` as `[B, S, P, C]`, by loops."""
        frames, rows, columns = GRID
        places = [
            latents[:, :, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(2).transpose(1, 2)
            for f in range(frames)
            for r in range(rows)
            for c in range(columns)
        ]
        return torch.stack(places, dim=1)

    def active(self, handle: dit_accel.Handle) -> Tensor:
        """Which tokens the coming forwards compute, bool `[B, S]`."""
        index = handle._sampler.chosen()
        return torch.zeros(len(index), self.tokens, dtype=torch.bool).scatter(1, index, True)


@pytest.fixture
def rig() -> type[Rig]:
    return Rig
