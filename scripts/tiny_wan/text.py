"""tiny-wan's text stage: `WanPipeline` masks padding and zeroes it."""

from __future__ import annotations

from pathlib import Path

from tiny_models.reading import TextPace, train_reading
from tiny_models.text import load_encoder
from torch import Tensor
from transformers import UMT5EncoderModel

from dit_accel.quality.scenes import sample_scene

from .models import make_tokenizer


def encode(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What `WanPipeline` gives the transformer: the last hidden state, padding zeroed, `[B, L, width]`."""
    return encoder(ids, mask).last_hidden_state * mask[..., None]


def train_text(out: Path, resume: Path | None, pace: TextPace) -> None:
    """Train until the time is up; writes `text-*` and `words-*` (the reader) and `text.json`."""
    tokenizer = make_tokenizer()
    encoder = load_encoder(resume, len(tokenizer))
    train_reading(encoder, encode, sample_scene, tokenizer, out, pace, stay=resume is not None, trim=True)
