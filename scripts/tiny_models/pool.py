"""Rendered scenes as latents, with their captions and labels: what the transformers are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.quality.scenes import Scene

from .captions import IGNORED, CaptionLabels, tokenise
from .labels import SceneLabels
from .text import CAPTION_TOKENS

CAPTION_DROP = 0.1


@dataclass(frozen=True)
class Drawn:
    """A batch: `latents` fp32 and `objects` fp32 (1 where one shows), of a clip `[B, C or 1, T, h, w]` and of an image
    `[B, C or 1, h, w]`; token `ids` and `mask` `[B, CAPTION_TOKENS]`.
    """

    latents: Tensor
    objects: Tensor
    ids: Tensor
    mask: Tensor
    labels: SceneLabels
    words: CaptionLabels


class ScenePool:
    """Scenes of one kind, rendered and encoded once.

    Args:
        latents, objects: as in `Drawn`, of all scenes; fp16 and bool, to save memory.
    """

    def __init__(
        self,
        latents: Tensor,
        objects: Tensor,
        labels: SceneLabels,
        scenes: Sequence[Scene],
        captions: Sequence[str],
        tokenizer,
    ):
        self.latents, self.objects, self.labels = latents, objects, labels
        ids, mask, words = tokenise(tokenizer, captions, scenes)
        device = latents.device
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
