"""Students with small CLIP encoders beside the text encoder: how their weights are kept, and found again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .learner import Student
from .shards import load_shards, save_shards

_STEMS = {"transformer": "dit", "text_encoder": "text", "clip": "clip"}  # of the shards


class ClipStudent(Student):
    """A `Student` with one or two small CLIP encoders beside the text encoder."""

    joint = True
    folders: dict[str, str]  # part of this student -> folder of the pipeline
    clip: nn.ModuleList

    def save(self, out: Path) -> None:
        """Write `dit-*`, `text-*` and `clip-*` shards."""
        for name, stem in _STEMS.items():
            save_shards(getattr(self, name).state_dict(), out, stem)

    def load(self, folder: Path) -> None:
        """Take over the weights of a run's shards (fp32), or of an exported pipeline folder (bf16, as it ships)."""
        if not (folder / "transformer").is_dir():
            for name, stem in _STEMS.items():
                getattr(self, name).load_state_dict(load_shards(folder, stem))
            return
        for name, place in self.folders.items():
            part = self.get_submodule(name)
            shipped = type(part).from_pretrained(folder / place, dtype=torch.float32)
            part.load_state_dict(shipped.state_dict())


def make_clip(
    vocabulary: int, width: int, tokens: int, *, projected: bool
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder whose pooled output, of this width, is that of the first end-of-text token (whose id is 1)."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=tokens,
        projection_dim=width,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)
