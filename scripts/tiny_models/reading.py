"""A text stage: teach an encoder which words belong together, from captions alone.

A training-only head reads off every token what it speaks of (see `captions.py`). This converges on a CPU in minutes,
and the transformer's training keeps it up.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_accel.quality.scenes import Scene, write_caption

from .captions import CaptionLabels, CaptionReader, tokenise
from .shards import save_shards

KEEP_OLD = 0.1  # weight of staying near the encoder that a transformer already knows


@dataclass(frozen=True)
class TextPace:
    """How long and how fast to train. See the command line's help for each field."""

    minutes: float
    batch: int
    rate: float
    seed: int
    device: str


def train_reading(
    encoder: nn.Module,
    encode: Callable[[nn.Module, Tensor, Tensor], Tensor],
    sample: Callable[..., Scene],
    tokenizer,
    out: Path,
    pace: TextPace,
    *,
    stay: bool,
    trim: bool,
) -> None:
    """Train until the time is up; writes `text-*` and `words-*` (the reader) and `text.json`.

    Args:
        encode: encoder, ids and mask `[B, L]` to what the pipeline gives the transformer, `[B, L, width]`.
        sample: draws scenes, as `scenes.sample_scene`.
        stay: whether to stay near the encoder as it is given.
        trim: whether padding changes nothing, so that it can be cut off.
    """
    started = time.time()
    torch.manual_seed(pace.seed)
    rng, device = random.Random(f"text-{pace.seed}"), pace.device
    encoder = encoder.to(device)
    old = copy.deepcopy(encoder).eval().requires_grad_(False) if stay else None
    reader = CaptionReader(encoder.get_input_embeddings().embedding_dim).to(device)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=pace.rate, betas=(0.9, 0.98), weight_decay=0.01)
    history, step, progress = [], 0, 0.0
    while progress < 1:
        scenes = [sample(rng, n_objects=rng.choice((1, 2, 2))) for _ in range(pace.batch)]
        captions = [write_caption(scene, rng) for scene in scenes]
        ids, mask, labels = tokenise(tokenizer, captions, scenes)
        longest = int(mask.sum(1).max()) if trim else ids.shape[1]
        ids, mask = ids[:, :longest].to(device), mask[:, :longest].to(device)
        labels = CaptionLabels(labels.owner[:, :longest], labels.objects, labels.ground).to(device)
        hidden = encode(encoder, ids, mask)
        read = reader(hidden, labels)
        moved = hidden.new_zeros(())
        if old is not None:
            before = encode(old, ids, mask)
            moved = (hidden - before).square().mean() / before.square().mean()
        optimiser.zero_grad(set_to_none=True)
        (read + KEEP_OLD * moved).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        progress = (time.time() - started) / (60 * pace.minutes)
        for group in optimiser.param_groups:
            group["lr"] = pace.rate * min(1.0, (step + 1) / 100) * max(0.01, 1 - progress)
        optimiser.step()
        step += 1
        if step % 100 == 0 or progress >= 1:
            history.append({"step": step, "read": round(read.item(), 4), "moved": round(moved.item(), 4)})
            print(f"text {history[-1]}", flush=True)
    save_shards(encoder.state_dict(), out, "text")
    save_shards(reader.state_dict(), out, "words")
    record = {"steps": step, **asdict(pace), "history": history}
    del record["device"]
    (out / "text.json").write_text(json.dumps(record))
