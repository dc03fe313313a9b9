"""Rendered clips as latents, with their captions and labels: what the transformer is trained on."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.quality.scenes import Scene, render_scenes, sample_scene, write_caption

from .labels import SceneLabels, cover_latents, label_scenes
from .text import CAPTION_TOKENS, IGNORED, CaptionLabels, tokenise

TWO_OBJECTS = 0.6  # share of clips; they are the harder ones
CAPTION_DROP = 0.1


@dataclass(frozen=True)
class Drawn:
    """A batch: `latents` fp32 and `objects` fp32 (1 where one shows) `[B, C or 1, T, h, w]`, token `ids` and `mask`."""

    latents: Tensor
    objects: Tensor
    ids: Tensor
    mask: Tensor
    labels: SceneLabels
    words: CaptionLabels


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


class ClipPool:
    """The clips of one kind, rendered and encoded once."""

    def __init__(self, vae, tokenizer, rng: random.Random, mix: Mix, device: str):
        count, size, frames = mix.clips, mix.size, mix.frames
        mean, std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
            for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        grid = ((frames - 1) // 2 + 1, size // 4, size // 4)
        self.latents = torch.empty(count, vae.config.z_dim, *grid, dtype=torch.float16, device=device)
        self.objects = torch.empty(count, 1, *grid, dtype=torch.bool, device=device)
        drawn, captions, labels, chunk = [], [], [], max(1, 32 * 128 * 128 * 33 // (size**2 * frames))
        for start in range(0, count, chunk):
            scenes = [_sample(rng) for _ in range(min(chunk, count - start))]
            drawn += scenes
            captions += [write_caption(s, rng) for s in scenes]
            clip = render_scenes(scenes, frames, size, size, device)
            with torch.no_grad(), torch.autocast(device.split(":")[0], torch.bfloat16):
                moments = vae.encode(clip).latent_dist.mode().float()
            self.latents[start : start + chunk] = ((moments - mean) / std).half()
            cover = cover_latents(scenes, frames, size, device)
            self.objects[start : start + chunk] = cover.amax(1, keepdim=True) > 0
            labels.append(label_scenes(scenes, cover, frames))
        self.labels = SceneLabels.join(labels)
        ids, mask, words = tokenise(tokenizer, captions, drawn)
        self.ids, self.mask, self.words = ids.to(device), mask.to(device), words.to(device)
        empty = tokenizer([""], padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
        self.empty = empty.input_ids.to(device), empty.attention_mask.to(device)

    def draw(self, count: int) -> Drawn:
        device = self.latents.device
        which = torch.randint(len(self.latents), (count,), device=device)
        drop = torch.rand(count, 1, device=device) < CAPTION_DROP
        words = self.words[which]
        words = replace(words, owner=words.owner.masked_fill(drop, IGNORED))
        return Drawn(
            self.latents[which].float(),
            self.objects[which].float(),
            torch.where(drop, self.empty[0], self.ids[which]),
            torch.where(drop, self.empty[1], self.mask[which]),
            self.labels[which],
            words,
        )


def _sample(rng: random.Random) -> Scene:
    return sample_scene(rng, n_objects=2 if rng.random() < TWO_OBJECTS else 1)
