"""A small Wan called step by step, and a whole run of it."""

from __future__ import annotations

from typing import Any

import torch

import dit_accel
from dit_accel.testing import tiny_wan_inputs, tiny_wan_transformer

GRID = (2, 4, 5)
ALWAYS = {"name": "easy", "threshold": 1e9, "min_steps": 0}


class Model:
    """A transformer that is called step by step, with branches by name."""

    def __init__(self, batch: int = 1, grid: tuple[int, int, int] = GRID) -> None:
        self.transformer = tiny_wan_transformer()
        self.resize(batch, grid)

    def resize(self, batch: int, grid: tuple[int, int, int]) -> None:
        self.inputs = tiny_wan_inputs(self.transformer, grid, batch=batch)
        text = self.inputs["encoder_hidden_states"]
        self.text = {"cond": text, "uncond": -text}

    def __call__(self, branch: str, time: float) -> torch.Tensor:
        """One forward; latents move a little from step to step, as in sampling."""
        given = dict(self.inputs)
        x = given["hidden_states"]
        given["hidden_states"] = self.x(time)
        given["encoder_hidden_states"] = self.text[branch]
        given["timestep"] = torch.full((len(x),), float(time))
        with torch.no_grad(), self.transformer.cache_context(branch):
            return self.transformer(**given, return_dict=False)[0]

    def x(self, time: float) -> torch.Tensor:
        return self.inputs["hidden_states"] * (0.5 + time / 2000)


def accelerate(model: Model, cache: Any, **more: Any) -> dit_accel.Handle:
    return dit_accel.accelerate(model.transformer, cache=cache, **more)


def sample(pipe: Any, *, steps: int = 12, seed: int = 0, **call: Any) -> torch.Tensor:
    return pipe(
        "a red star", "blurry", 96, 112, num_frames=9, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(seed), **call,
    ).frames  # fmt: skip
