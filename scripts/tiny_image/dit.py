"""The transformer stage: flow matching on latents of rendered stills, with the text encoders trained along."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models.learner import Heads, Student
from tiny_models.ranks import Ranks
from tiny_models.shards import save_shards
from tiny_models.training import Pace, train

from .images import Mix, fill_pool
from .models import FLOW_SHIFT, load_vae
from .students import FAMILIES, ImageStudent
from .text import load_encoder, load_tokenizer


@dataclass(frozen=True)
class ImageOptions:
    """See the command line's help for each field."""

    family: str
    out: Path
    vae_from: Path
    text_from: Path
    resume: Path | None
    mix: tuple[Mix, ...]
    pace: Pace
    device: str


def train_image(options: ImageOptions) -> None:
    """Train until the time is up; rank 0 writes shards (EMA, fp32) `dit-*`, `text-*`, `clip-*`, and `dit.json`."""
    started = time.time()
    ranks = Ranks.join(options.device)
    torch.manual_seed(options.pace.seed * 1000 + ranks.rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    vae, rng = load_vae(options.vae_from).to(ranks.device), random.Random(f"{options.pace.seed}-{ranks.rank}")
    tokenizer = load_tokenizer()
    pools = [fill_pool(vae, tokenizer, rng, mix, ranks.device) for mix in options.mix]
    if ranks.first:
        print(f"rendered and encoded in {time.time() - started:.0f} s on {ranks.world} GPUs", flush=True)

    torch.manual_seed(options.pace.seed)  # equal initial weights on every rank
    student = make_student(options.family, options.text_from if options.resume is None else None)
    if options.resume:
        student.load(options.resume)
    heads = Heads.make(student, options.resume, options.resume or options.text_from)
    student.to(ranks.device)
    heads.modules.to(ranks.device)
    record = train(
        student,
        heads,
        pools,
        options.mix,
        options.pace,
        ranks,
        started=started,
        shift=FLOW_SHIFT,
        tapped=student.tapped,
        tokens=options.mix[0].tokens + student.text_tokens,
        save=lambda average, heads: _save(options.out, average, heads),
    )
    if ranks.first:
        record |= {"family": options.family, "resumed": options.resume is not None}
        (options.out / "dit.json").write_text(json.dumps(record))
    ranks.leave()


def make_student(family: str, text_from: Path | None = None) -> ImageStudent:
    """A fresh student whose text encoder comes from `text-*` shards or a tiny-wan folder, or is fresh too."""
    return FAMILIES[family](load_encoder(text_from, len(load_tokenizer())))


def _save(out: Path, average: Student, heads: Heads) -> None:
    for name, head in heads.modules.items():
        save_shards(head.state_dict(), out, name)
    average.save(out)
