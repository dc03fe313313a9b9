"""The text stage: teach the encoder which words belong together, from captions alone.

A training-only head reads off every token what it speaks of (`tiny_models/captions.py`). This converges on a CPU in
minutes, and the transformer's training keeps it up.
"""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path

import torch
from tiny_models.captions import CaptionLabels, CaptionReader, tokenise
from tiny_models.shards import save_shards
from tiny_models.text import load_encoder
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from dit_accel.quality.scenes import sample_scene, write_caption

from .models import make_tokenizer

KEEP_OLD = 0.1  # weight of staying near the encoder that the transformer already knows


def encode(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What `WanPipeline` gives the transformer: the last hidden state, padding zeroed, `[B, L, width]`."""
    return encoder(ids, mask).last_hidden_state * mask[..., None]


def train_text(
    out: Path, resume: Path | None, minutes: float, batch: int, rate: float, seed: int, device: str
):
    """Train until `minutes` have passed; writes `text-*` and `words-*` (the reader) and `text.json`."""
    started = time.time()
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(f"text-{seed}"), make_tokenizer()
    encoder = load_encoder(resume, len(tokenizer)).to(device)
    old = copy.deepcopy(encoder).eval().requires_grad_(False) if resume else None
    reader = CaptionReader(encoder.config.d_model).to(device)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    history, step, progress = [], 0, 0.0
    while progress < 1:
        scenes = [sample_scene(rng, n_objects=rng.choice((1, 2, 2))) for _ in range(batch)]
        captions = [write_caption(scene, rng) for scene in scenes]
        ids, mask, labels = tokenise(tokenizer, captions, scenes)
        longest = int(mask.sum(1).max())  # padding changes nothing, and costs
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
        progress = (time.time() - started) / (60 * minutes)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * max(0.01, 1 - progress)
        optimiser.step()
        step += 1
        if step % 100 == 0 or progress >= 1:
            history.append({"step": step, "read": round(read.item(), 4), "moved": round(moved.item(), 4)})
            print(f"text {history[-1]}", flush=True)
    save_shards(encoder.state_dict(), out, "text")
    save_shards(reader.state_dict(), out, "words")
    record = {
        "steps": step,
        "minutes": minutes,
        "batch": batch,
        "rate": rate,
        "seed": seed,
        "history": history,
    }
    (out / "text.json").write_text(json.dumps(record))
