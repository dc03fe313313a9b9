"""The transformer stage: flow matching on latents of rendered clips, with the text encoders trained along."""

from __future__ import annotations

import random
from pathlib import Path

from tiny_models.clips import Coder, Mix, fill_pool
from tiny_models.pool import ScenePool
from tiny_models.stage import StageOptions, train_student
from tiny_models.text import CAPTION_TOKENS
from torch import nn

from .models import FACTOR, FLOW_SHIFT, LATENT_CHANNELS, PERIOD, load_vae
from .student import STRONGEST, HunyuanStudent
from .text import CaptionTokenizer, load_llama, make_tokenizers


def train_hunyuan(vae_from: Path, guide_from: Path | None, options: StageOptions) -> None:
    """Train until the time is up; writes what `train_student` does.

    Args:
        guide_from: folder of a trained student, shards or pipeline, whose guidance is built in.
    """
    vae, tokenizer = load_vae(vae_from), CaptionTokenizer(make_tokenizers()[0])
    coder = make_coder(vae)

    def fill(mix: Mix, rng: random.Random, device: str) -> ScenePool:
        vae.to(device)
        return fill_pool(coder, tokenizer, rng, mix, device)

    def make(text_from: Path | None, device: str) -> HunyuanStudent:
        teacher = None
        if guide_from is not None:
            teacher = make_student(tokenizer)
            teacher.load(guide_from)
            teacher.to(device).eval().requires_grad_(False).hurry()
            if options.pace.compiled:
                teacher.compile_parts()
        student = make_student(tokenizer, text_from, teacher)
        student.hurry()
        return student

    train_student(
        options,
        fill,
        make,
        shift=FLOW_SHIFT,
        tapped=HunyuanStudent.tapped,
        tokens=coder.count_tokens(options.mix[0]) + CAPTION_TOKENS,
        told={"guidance": 1.0 if guide_from is None else [1.0, STRONGEST]},
    )


def make_coder(vae: nn.Module) -> Coder:
    """The stock autoencoder, in its tiles."""
    return Coder(lambda clip: vae.encode(clip).latent_dist.mode(), LATENT_CHANNELS, FACTOR, PERIOD)


def make_student(
    tokenizer: CaptionTokenizer, text_from: Path | None = None, teacher: HunyuanStudent | None = None
) -> HunyuanStudent:
    """A fresh student; its text encoder may come from a run's `text-*` shards."""
    told = tokenizer([""], padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
    empty = told.input_ids, told.attention_mask
    return HunyuanStudent(load_llama(text_from, len(tokenizer)), tokenizer.before, empty, teacher)
