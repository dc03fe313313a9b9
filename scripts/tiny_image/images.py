"""Rendered stills as latents: what the transformers are trained on."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from tiny_models.labels import SceneLabels, cover_latents, label_scenes
from tiny_models.pool import ScenePool

from dit_accel.quality.scenes import render_scenes, sample_still, write_caption

from .models import FACTOR, LARGEST, LATENT_CHANNELS

TWO_OBJECTS = 0.6  # share of images; they are the harder ones
_CHUNK = 64 * 256 * 256  # pixels rendered at once


@dataclass(frozen=True)
class Mix:
    """One kind of image in the mix: `size` pixels square, `batch` images a step on each GPU, in a `share` of the steps.

    `images` is how many each GPU renders.
    """

    size: int
    batch: int
    share: float
    images: int

    @classmethod
    def parse(cls, text: str) -> Mix:
        """From `SIZE:BATCH:SHARE:IMAGES`, as in `256:24:0.5:8192`."""
        found = re.fullmatch(r"(\d+):(\d+):([\d.]+):(\d+)", text)
        if not found:
            raise ValueError(f"mix is {text!r}; write SIZE:BATCH:SHARE:IMAGES, as in 256:24:0.5:8192")
        size, batch, share, images = found.groups()
        if int(size) % (4 * FACTOR) or not 32 <= int(size) <= LARGEST:
            raise ValueError(
                f"mix is {text!r}; the size must be a multiple of {4 * FACTOR} from 32 to {LARGEST}"
            )
        return cls(int(size), int(batch), float(share), int(images))

    @property
    def tokens(self) -> int:
        return (self.size // FACTOR // 2) ** 2


def fill_pool(vae: AutoencoderKL, tokenizer, rng: random.Random, mix: Mix, device: str) -> ScenePool:
    """Render and encode the images of one kind."""
    count, size = mix.images, mix.size
    side, chunk = size // FACTOR, max(1, _CHUNK // size**2)
    latents = torch.empty(count, LATENT_CHANNELS, side, side, dtype=torch.float16, device=device)
    objects = torch.empty(count, 1, side, side, dtype=torch.bool, device=device)
    drawn, captions, labels = [], [], []
    for start in range(0, count, chunk):
        scenes = [
            sample_still(rng, n_objects=2 if rng.random() < TWO_OBJECTS else 1)
            for _ in range(min(chunk, count - start))
        ]
        drawn += scenes
        captions += [write_caption(scene, rng) for scene in scenes]
        pixels = render_scenes(scenes, 1, size, size, device)[:, :, 0]
        with torch.no_grad(), torch.autocast(device.split(":")[0], torch.bfloat16):
            latents[start : start + chunk] = vae.encode(pixels).latent_dist.mode().half()
        cover = cover_latents(scenes, 1, size, device, FACTOR)  # [B, 2, 1, h, w]
        objects[start : start + chunk] = cover.amax(1) > 0
        labels.append(label_scenes(scenes, cover, 1))
    return ScenePool(latents, objects, SceneLabels.join(labels), drawn, captions, tokenizer)
