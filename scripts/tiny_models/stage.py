"""A transformer stage from end to end: scenes, student, heads, training, shards and the record."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .learner import Heads
from .pool import ScenePool
from .ranks import Ranks
from .shards import save_shards
from .students import ClipStudent
from .training import Kind, Pace, train


@dataclass(frozen=True)
class StageOptions:
    """See the command line's help for each field."""

    out: Path
    text_from: Path
    resume: Path | None
    mix: Sequence[Kind]
    pace: Pace
    device: str


def train_student(
    options: StageOptions,
    fill: Callable[[Any, random.Random, str], ScenePool],
    make: Callable[[Path | None, str], ClipStudent],
    *,
    shift: float,
    tapped: int,
    tokens: int,
    told: dict[str, Any],
) -> None:
    """Train until the time is up; rank 0 writes shards (EMA, fp32) `dit-*`, `text-*`, `clip-*`, and `dit.json`.

    Args:
        fill: renders and encodes the scenes of one kind: of the mix, with a generator, on a device.
        make: a student with the text encoder of a folder, or without one a fresh student; it may use the device.
        shift, tapped, tokens: as of `training.train`.
        told: what else the record shall say.
    """
    started = time.time()
    ranks = Ranks.join(options.device)
    torch.manual_seed(options.pace.seed * 1000 + ranks.rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    rng = random.Random(f"{options.pace.seed}-{ranks.rank}")
    pools = [fill(kind, rng, ranks.device) for kind in options.mix]
    if ranks.first:
        print(f"rendered and encoded in {time.time() - started:.0f} s on {ranks.world} GPUs", flush=True)

    torch.manual_seed(options.pace.seed)  # equal initial weights on every rank
    student = make(options.text_from if options.resume is None else None, ranks.device)
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
        shift=shift,
        tapped=tapped,
        tokens=tokens,
        save=lambda average, heads: _save(options.out, average, heads),
    )
    if ranks.first:
        record |= {**told, "resumed": options.resume is not None}
        (options.out / "dit.json").write_text(json.dumps(record))
    ranks.leave()


def _save(out: Path, average: ClipStudent, heads: Heads) -> None:
    for name, head in heads.modules.items():
        save_shards(head.state_dict(), out, name)
    average.save(out)
