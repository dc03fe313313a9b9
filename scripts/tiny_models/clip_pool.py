"""Rendered clips that an autoencoder is trained on."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from dit_accel.quality.scenes import object_masks, render_scenes, sample_scene

from .autoencoder import OBJECT_WEIGHT


class ClipPool:
    """Rendered clips kept as uint8 with their object masks, from which batches are cut."""

    def __init__(self, rng: random.Random, count: int, frames: int, size: int, device: str):
        self.clips = torch.empty(count, 3, frames, size, size, dtype=torch.uint8, device=device)
        self.masks = torch.empty(count, 1, frames, size, size, dtype=torch.bool, device=device)
        self.device = device
        for i in range(count):
            scene = [sample_scene(rng)]
            clip = render_scenes(scene, frames, size, size, device)
            self.clips[i] = ((clip[0] + 1) * 127.5).round().clamp(0, 255).byte()
            self.masks[i] = object_masks(scene, frames, size, size, device)[0] > 0

    def draw_frames(self, count: int) -> tuple[Tensor, Tensor]:
        """Single frames and weights, `[count, 3 or 1, 1, h, w]`, pixels in [-1, 1]."""
        which = torch.randint(len(self.clips), (count,), device=self.device)
        frame = torch.randint(self.clips.shape[2], (count,), device=self.device)
        return self._as_float(
            self.clips[which, :, frame][:, :, None], self.masks[which, :, frame][:, :, None]
        )

    def draw_clips(self, count: int, frames: int) -> tuple[Tensor, Tensor]:
        """So many frames in a row and weights, `[count, 3 or 1, frames, h, w]`; they begin at the same for all."""
        which = torch.randint(len(self.clips), (count,), device=self.device)
        first = int(torch.randint(self.clips.shape[2] - frames + 1, (1,)))
        return self._as_float(
            self.clips[which, :, first : first + frames], self.masks[which, :, first : first + frames]
        )

    @staticmethod
    def _as_float(clips: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        return clips.float() / 127.5 - 1, 1 + OBJECT_WEIGHT * masks.float()


def draw_unseen_clip(rng: random.Random, frames: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """A clip of what training never shows, `[1, 3, F, size, size]` in [-1, 1], and where its objects are, bool."""
    scene = [sample_scene(rng, held_out=True)]
    clip = render_scenes(scene, frames, size, size, device)
    return clip, object_masks(scene, frames, size, size, device) > 0.5
