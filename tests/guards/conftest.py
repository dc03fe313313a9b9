"""Sparse attention that goes wrong on purpose, in layers of one's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.kernels import block_sparse as kernels
from dit_accel.testing import tiny_wan_pipeline

SPARSE = {"keep": 0.4, "block": 16, "min_tokens": 0}
STEPS = 3


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Equal to the bit from run to run."""


@pytest.fixture
def accelerate() -> Callable[..., dit_accel.Handle]:
    return lambda target, **options: dit_accel.accelerate(target, None, **{**SPARSE, **options})


@pytest.fixture
def pipe() -> Any:
    return tiny_wan_pipeline(transformer={"num_layers": 3})


@pytest.fixture
def sample() -> Callable[..., Tensor]:
    """The latents of a run of both branches of guidance, 84 tokens."""

    def run(pipe: Any, steps: int = STEPS, seed: int = 0, **more: Any) -> Tensor:
        size = {"height": 96, "width": 112, "num_frames": 5}
        told = {"prompt": "a red star", "negative_prompt": "blurry", "guidance_scale": 4.0}
        generator = torch.Generator().manual_seed(seed)
        own = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
        return pipe(**{**told, **size, **own, **more}).frames

    return run


class Faulty:
    """Spoils what the executor gives out in one layer, for so many of its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layer: int | None = None
        self.fault: float | Exception = float("nan")
        self.times = 0  # how often it goes wrong yet
        self.only_parts_of = 0  # only where there are fewer queries than this, in whichever layer
        self._here: int | None = None
        for name in ("block_sparse", "block_sparse_feedback"):
            monkeypatch.setattr(kernels, name, self._spoiling(getattr(kernels, name)))

    def follow(self, handle: dit_accel.Handle) -> Faulty:
        """Hear from a handle which layer is under way."""
        handle.observe(lambda call, *rest: setattr(self, "_here", call.layer))
        return self

    def at(self, layer: int, fault: float | Exception, times: int = 1) -> None:
        self.layer, self.fault, self.times = layer, fault, times

    def _spoiling(self, execute: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def run(*args: Any, **known: Any) -> tuple[Tensor, ...]:
            out, *rest = execute(*args, **known)
            here = out.shape[2] < self.only_parts_of if self.only_parts_of else self._here == self.layer
            if here and self.times:
                self.times -= 1
                if isinstance(self.fault, Exception):
                    raise self.fault
                out[..., -1, 0] = self.fault  # one number of the last token
            return out, *rest

        return run


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    return Faulty(monkeypatch)
