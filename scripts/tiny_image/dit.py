"""The transformer stage: flow matching on latents of rendered stills, with the text encoders trained along."""

from __future__ import annotations

from pathlib import Path

from tiny_models.stage import StageOptions, train_student

from .images import fill_pool
from .models import FLOW_SHIFT, load_vae
from .students import FAMILIES, ImageStudent
from .text import load_encoder, load_tokenizer


def train_image(family: str, vae_from: Path, options: StageOptions) -> None:
    """Train until the time is up; writes what `train_student` does."""
    vae, tokenizer, kind = load_vae(vae_from), load_tokenizer(), FAMILIES[family]
    train_student(
        options,
        lambda mix, rng, device: fill_pool(vae.to(device), tokenizer, rng, mix, device),
        lambda text_from, _: make_student(family, text_from),
        shift=FLOW_SHIFT,
        tapped=kind.tapped,
        tokens=options.mix[0].tokens + kind.text_tokens,
        told={"family": family},
    )


def make_student(family: str, text_from: Path | None = None) -> ImageStudent:
    """A fresh student whose text encoder comes from `text-*` shards or a tiny-wan folder, or is fresh too."""
    return FAMILIES[family](load_encoder(text_from, len(load_tokenizer())))
