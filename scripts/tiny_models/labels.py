"""What every token of a clip or an image shows, and a training-only head that learns to say so.

Rendered clips come with their truth. A linear head in the middle of the transformer reads it off the hidden state of
each token: whether an object covers it, which colour, shape and motion that object has, where the objects' centres
are, what the background is. The head is thrown away after training; what stays is a transformer that has settled what
goes where by half its depth. (The idea of supervising a middle layer is REPA, arXiv:2410.06940, with truth in the
place of a pretrained encoder's features.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_accel.quality.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    STILL,
    Scene,
    object_masks,
    object_path,
)

MAX_OBJECTS = 2
_COLOURS = tuple(COLOURS)
_PANS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
_ABSENT = -100  # what cross_entropy ignores
_CLASSES = (len(_COLOURS), len(SHAPES), len(MOTIONS))
_GROUNDS = (len(BACKGROUNDS), len(_PANS))


@dataclass(frozen=True)
class SceneLabels:
    """Truth of B clips of T latent frames; token grid `[T, H, W]`.

    `cover` bool `[B, 2, T, H, W]`; `centres` fp32 `[B, 2, 2, T]`, (x, y) as fractions of the frame; `objects` int64
    `[B, 2, 3]` (colour, shape, motion), -100 without a second object and for a still's motion; `ground` int64
    `[B, 2]` (kind, direction of pan). An image is a clip of one frame.
    """

    cover: Tensor
    centres: Tensor
    objects: Tensor
    ground: Tensor

    def __getitem__(self, which: Tensor) -> SceneLabels:
        return SceneLabels(*(getattr(self, f.name)[which] for f in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[SceneLabels]) -> SceneLabels:
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))


def cover_latents(
    scenes: Sequence[Scene], frames: int, size: int, device: str, factor: int = 4, period: int = 2
) -> Tensor:
    """How far each object covers each latent of square clips: `[B, 2, T, h, w]`.

    A latent is `factor` pixels square; the first is one frame, the others `period` of them.
    """
    alone = [Scene((thing,), scene.background) for scene in scenes for thing in scene.objects]
    masks = object_masks(alone, frames, size, size, device)
    found = F.max_pool3d(masks[:, :, :1], (1, factor, factor))
    if frames > 1:
        found = torch.cat([found, F.max_pool3d(masks[:, :, 1:], (period, factor, factor))], 2)
    found = found[:, 0]
    cover = found.new_zeros(len(scenes), MAX_OBJECTS, *found.shape[1:])
    clips = [index for index, scene in enumerate(scenes) for _ in scene.objects]
    slots = [slot for scene in scenes for slot in range(len(scene.objects))]
    cover[clips, slots] = found
    return cover


def label_scenes(scenes: Sequence[Scene], cover: Tensor, frames: int, period: int = 2) -> SceneLabels:
    """The truth of clips of `frames` frames with the `cover` of their latents; patches are 2x2 latents."""
    latents = cover.shape[2]
    time = torch.arange(latents) * float(period)
    time = (time - 0.5 * (period - 1) * (time > 0)) / max(frames - 1, 1)  # the middle of a latent's frames
    centres = torch.zeros(len(scenes), MAX_OBJECTS, 2, latents)
    objects = torch.full((len(scenes), MAX_OBJECTS, 3), _ABSENT)
    ground = torch.empty(len(scenes), 2, dtype=torch.int64)
    for index, scene in enumerate(scenes):
        pan = tuple((p > 0) - (p < 0) for p in scene.background.pan)
        ground[index] = torch.tensor([BACKGROUNDS.index(scene.background.kind), _PANS.index(pan)])
        for slot, thing in enumerate(scene.objects):
            x, y, _, _ = object_path(thing, time)
            centres[index, slot] = torch.stack([x, y])
            objects[index, slot] = torch.tensor(
                [_COLOURS.index(thing.colour), SHAPES.index(thing.shape), _index_motion(thing.motion)]
            )
    tokens = F.max_pool3d(cover, (1, 2, 2)) > 0.5
    return SceneLabels(tokens, *(t.to(cover.device) for t in (centres, objects, ground)))


def _index_motion(motion: str) -> int:
    return _ABSENT if motion == STILL else MOTIONS.index(motion)


class TokenReader(nn.Module):
    """Reads a token's truth from its hidden state, `[B, T*H*W, width]`."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = [MAX_OBJECTS, 2 * MAX_OBJECTS, *_CLASSES, *_GROUNDS]
        self.read = nn.Linear(width, sum(self.sizes))

    def forward(self, hidden: Tensor, labels: SceneLabels) -> Tensor:
        """How wrong the reading is; scalar fp32."""
        cover_logits, offsets, *rest = self.read(self.norm(hidden)).float().split(self.sizes, -1)
        classes, grounds = rest[: len(_CLASSES)], rest[len(_CLASSES) :]
        batch, _, frames, height, width = labels.cover.shape
        cover = labels.cover.flatten(2).transpose(1, 2).float()  # [B, N, 2]
        loss = 5 * F.binary_cross_entropy_with_logits(cover_logits, cover)
        loss = loss + 2 * self._miss_centres(
            offsets.view(batch, frames, height, width, MAX_OBJECTS, 2), labels
        )
        owner = cover.argmax(-1)  # [B, N]
        for place, logits in enumerate(classes):
            truth = labels.objects[:, :, place].gather(1, owner)
            loss = loss + _cross_entropy(logits, truth, cover.amax(-1) * (truth != _ABSENT))
        for place, logits in enumerate(grounds):
            truth = labels.ground[:, place, None].expand(-1, logits.shape[1])
            loss = loss + _cross_entropy(logits, truth, torch.ones_like(logits[..., 0]))
        return loss

    @staticmethod
    def _miss_centres(offsets: Tensor, labels: SceneLabels) -> Tensor:
        _, _, height, width, _, _ = offsets.shape
        ys = (torch.arange(height, device=offsets.device) + 0.5) / height
        xs = (torch.arange(width, device=offsets.device) + 0.5) / width
        here = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)[
            None, None, :, :, None
        ]  # [1, 1, H, W, 1, 2]
        truth = labels.centres.permute(0, 3, 1, 2)[:, :, None, None] - here  # [B, T, H, W, 2, 2]
        present = (labels.objects[:, :, 0] != _ABSENT).float()[:, None, None, None, :, None]
        miss = F.smooth_l1_loss(offsets, truth, reduction="none", beta=0.1) * present
        return miss.sum() / (present.expand_as(miss).sum() + 1)


def _cross_entropy(logits: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none", ignore_index=_ABSENT)
    return (loss * weight.flatten()).sum() / (weight.sum() + 1)
