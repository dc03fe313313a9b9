"""Rendered clips as latents: what the video transformers are trained on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.quality.scenes import render_scenes, sample_scene, write_caption

from .labels import SceneLabels, cover_latents, label_scenes
from .pool import ScenePool

TWO_OBJECTS = 0.6  # share of clips; they are the harder ones


@dataclass(frozen=True)
class Mix:
    """One kind of clip in the mix: `size` pixels square, `batch` clips a step on each GPU, in a `share` of the steps.

    `clips` is how many each GPU renders.
    """

    size: int
    frames: int
    batch: int
    share: float
    clips: int

    @classmethod
    def parse(cls, text: str) -> Mix:
        """From `SIZExFRAMES:BATCH:SHARE:CLIPS`, as in `128x33:24:0.5:4096`."""
        found = re.fullmatch(r"(\d+)x(\d+):(\d+):([\d.]+):(\d+)", text)
        if not found:
            raise ValueError(
                f"mix is {text!r}; write SIZExFRAMES:BATCH:SHARE:CLIPS, as in 128x33:24:0.5:4096"
            )
        size, frames, batch, share, clips = found.groups()
        if int(size) % 16 or int(frames) % 4 != 1 or int(frames) == 1:
            raise ValueError(
                f"mix is {text!r}; the size must be a multiple of 16, the frames 1 + 4k from 5 on"
            )
        return cls(int(size), int(frames), int(batch), float(share), int(clips))


@dataclass(frozen=True)
class Coder:
    """How clips become latents.

    `encode` takes pixels `[B, 3, F, H, W]` to what the transformer denoises, `[B, channels, T, H / factor,
    W / factor]`, T = 1 + (F - 1) / period, with mean 0 and deviation 1.
    """

    encode: Callable[[Tensor], Tensor]
    channels: int
    factor: int
    period: int

    def count_tokens(self, mix: Mix) -> int:
        """Tokens of one clip, with patches of 2x2 latents."""
        return (1 + (mix.frames - 1) // self.period) * (mix.size // self.factor // 2) ** 2


def fill_pool(coder: Coder, tokenizer, rng: random.Random, mix: Mix, device: str) -> ScenePool:
    """Render and encode the clips of one kind."""
    count, size, frames = mix.clips, mix.size, mix.frames
    grid = ((frames - 1) // coder.period + 1, size // coder.factor, size // coder.factor)
    latents = torch.empty(count, coder.channels, *grid, dtype=torch.float16, device=device)
    objects = torch.empty(count, 1, *grid, dtype=torch.bool, device=device)
    drawn, captions, labels, chunk = [], [], [], max(1, 32 * 128 * 128 * 33 // (size**2 * frames))
    for start in range(0, count, chunk):
        scenes = [
            sample_scene(rng, n_objects=2 if rng.random() < TWO_OBJECTS else 1)
            for _ in range(min(chunk, count - start))
        ]
        drawn += scenes
        captions += [write_caption(s, rng) for s in scenes]
        clip = render_scenes(scenes, frames, size, size, device)
        with torch.no_grad(), torch.autocast(device.split(":")[0], torch.bfloat16):
            latents[start : start + chunk] = coder.encode(clip).half()
        cover = cover_latents(scenes, frames, size, device, coder.factor, coder.period)
        objects[start : start + chunk] = cover.amax(1, keepdim=True) > 0
        labels.append(label_scenes(scenes, cover, frames, coder.period))
    return ScenePool(latents, objects, SceneLabels.join(labels), drawn, captions, tokenizer)
