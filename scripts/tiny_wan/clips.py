"""Rendered clips as latents: what the transformer is trained on."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
from tiny_models.labels import SceneLabels, cover_latents, label_scenes
from tiny_models.pool import ScenePool

from dit_accel.quality.scenes import Scene, render_scenes, sample_scene, write_caption

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


def fill_pool(vae, tokenizer, rng: random.Random, mix: Mix, device: str) -> ScenePool:
    """Render and encode the clips of one kind."""
    count, size, frames = mix.clips, mix.size, mix.frames
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    grid = ((frames - 1) // 2 + 1, size // 4, size // 4)
    latents = torch.empty(count, vae.config.z_dim, *grid, dtype=torch.float16, device=device)
    objects = torch.empty(count, 1, *grid, dtype=torch.bool, device=device)
    drawn, captions, labels, chunk = [], [], [], max(1, 32 * 128 * 128 * 33 // (size**2 * frames))
    for start in range(0, count, chunk):
        scenes = [_sample(rng) for _ in range(min(chunk, count - start))]
        drawn += scenes
        captions += [write_caption(s, rng) for s in scenes]
        clip = render_scenes(scenes, frames, size, size, device)
        with torch.no_grad(), torch.autocast(device.split(":")[0], torch.bfloat16):
            moments = vae.encode(clip).latent_dist.mode().float()
        latents[start : start + chunk] = ((moments - mean) / std).half()
        cover = cover_latents(scenes, frames, size, device)
        objects[start : start + chunk] = cover.amax(1, keepdim=True) > 0
        labels.append(label_scenes(scenes, cover, frames))
    return ScenePool(latents, objects, SceneLabels.join(labels), drawn, captions, tokenizer)


def _sample(rng: random.Random) -> Scene:
    return sample_scene(rng, n_objects=2 if rng.random() < TWO_OBJECTS else 1)
