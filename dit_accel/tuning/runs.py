"""Runs: real ones of presets on held-out clips, and what they are worth against dense."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel.handle import accelerate
from dit_accel.preset import Preset
from dit_accel.quality.metrics import psnr, ssim
from dit_accel.report import Report
from dit_accel.tuning.interpose import transformers_of, walk
from dit_accel.tuning.threshold import DRY, computed_in, expected_of

_SMALLEST = 11  # pixels a side that SSIM needs


@dataclass(frozen=True)
class Clip:
    """What is made: a prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Made:
    """One clip that was made."""

    frames: np.ndarray  # uint8 [F, H, W, 3]
    seconds: float  # text, denoising and decoding
    forward_seconds: float  # of these, in the transformers
    forwards: int
    velocities: np.ndarray | None  # fp32 [n, elements], where they were asked for
    report: Report | None = None  # None: nothing of ours ran
    computed: tuple[bool, ...] | None = None  # [n] which steps a cache computed; None: all
    # [n] the error that a cache expected of each step held, where it was asked to watch; None where it could not tell
    expected: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Likeness:
    """A clip against its dense one."""

    psnr: float  # dB
    ssim: float | None  # None for frames too small for it
    seconds: float
    dense_seconds: float
    error: float | None  # of the velocity, root mean square over steps; None: not looked at

    @property
    def time(self) -> float:
        return self.seconds / self.dense_seconds


class Maker:
    """Makes clips with one pipeline."""

    def __init__(self, pipe: Any, recipe: ModuleType, velocities: bool, tick: Callable[[], None]) -> None:
        self.pipe, self.recipe, self.velocities, self.tick = pipe, recipe, velocities, tick

    def frames(self, preset: Preset, clip: Clip) -> np.ndarray:
        """Frames, by what is installed on the pipeline now."""
        return self.recipe.generate(self.pipe, preset.generate, clip.prompt, seed=clip.seed)

    def make(self, preset: Preset, clip: Clip, watched: bool = False) -> Made:
        """A clip as a preset has it, all parts of it installed for this alone.

        Args:
            watched: of a dense preset: have a cache watch, which computes every step as it is.
        """
        kept: list[Tensor] = []
        seconds = [0.0, 0.0]  # when a forward began, and all of them
        count = 0

        def on_step(_: int, velocity: Tensor) -> Tensor:
            if self.velocities:
                kept.append(velocity.float().cpu().flatten())
            return velocity

        def before(module: Any, args: Any) -> None:
            _wait(module)
            seconds[0] = time.perf_counter()

        def behind(module: Any, args: Any, output: Any) -> None:
            nonlocal count
            _wait(module)
            seconds[1] += time.perf_counter() - seconds[0]
            count += 1
            self.tick()

        with contextlib.ExitStack() as stack:
            handle = None
            if watched:
                handle = stack.enter_context(accelerate(self.pipe, None, cache=DRY))
            elif not preset.is_stock:
                handle = stack.enter_context(accelerate(self.pipe, preset))
            stack.enter_context(walk(self.pipe.scheduler, on_step))
            for module in transformers_of(self.pipe).values():
                stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                stack.callback(module.register_forward_hook(behind).remove)
            began = time.perf_counter()
            frames = self.frames(preset, clip)
            took = time.perf_counter() - began
            report = None if handle is None or watched else handle.report()
            decisions = None if handle is None or watched else handle.decisions()
            trials = handle.trials() if watched else []
        velocities = torch.stack(kept).numpy() if kept else None
        steps = preset.generate.steps
        expected = tuple(expected_of(trials, steps)) if watched else None
        return Made(frames, took, seconds[1], count, velocities, report, computed_in(decisions, steps), expected)


def compare(made: Made, dense: Made) -> Likeness:
    """How a clip stands to its dense one; PSNR is 100 dB where they are equal."""
    error, ours, theirs = None, made.velocities, dense.velocities
    if ours is not None and theirs is not None and len(ours) == len(theirs):
        apart = np.square(ours - theirs).sum(1) / np.square(theirs).sum(1)
        error = float(np.sqrt(apart.mean()))
    fits = min(made.frames.shape[1:3]) >= _SMALLEST
    return Likeness(
        psnr=min(100.0, psnr(made.frames, dense.frames)),
        ssim=ssim(made.frames, dense.frames) if fits else None,
        seconds=made.seconds,
        dense_seconds=dense.seconds,
        error=error,
    )


def _wait(module: Any) -> None:
    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
