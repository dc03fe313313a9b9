"""The text stage: teach the encoder which words belong together, from captions alone.

Left to the transformer's loss, the encoder stays a bag of words: which colour goes with which shape shows only in a
narrow band of noise levels, and after 20 minutes on four GPUs a probe of the word "ring" could not tell the ring's
colour in a caption of two objects. So a training-only head reads, off every token, which object it speaks of and all
that the caption says of that object. This converges on a CPU in minutes, and the transformer's training keeps it up.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from dit_accel.quality.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    RADII,
    SHAPES,
    Scene,
    describe_object,
    sample_scene,
    write_caption,
)

from .models import load_shards, make_text_encoder, make_tokenizer, save_shards

CAPTION_TOKENS = 48
KEEP_OLD = 0.1  # weight of staying near the encoder that the transformer already knows
_NAMES = (tuple(COLOURS), SHAPES, MOTIONS, tuple(RADII))
IGNORED = -100  # what cross_entropy ignores


@dataclass(frozen=True)
class CaptionLabels:
    """Truth of B captions of L tokens, int64.

    `owner` `[B, L]`: 0 for words about no object, 1 for the first's, 2 for the second's, -100 for padding;
    `objects` `[B, 3, 4]`: colour, shape, motion and size by owner, -100 where there is none;
    `ground` `[B, 3]`: kind of background, whether it pans, whether there are two objects.
    """

    owner: Tensor
    objects: Tensor
    ground: Tensor

    def __getitem__(self, which: Tensor) -> CaptionLabels:
        return CaptionLabels(*(getattr(self, f.name)[which] for f in fields(self)))

    def to(self, device: str) -> CaptionLabels:
        return CaptionLabels(*(getattr(self, f.name).to(device) for f in fields(self)))


def tokenise(
    tokenizer, captions: Sequence[str], scenes: Sequence[Scene]
) -> tuple[Tensor, Tensor, CaptionLabels]:
    """Ids and mask `[B, CAPTION_TOKENS]`, and what the tokens speak of."""
    told = tokenizer(
        list(captions),
        padding="max_length",
        max_length=CAPTION_TOKENS,
        truncation=True,
        return_tensors="pt",
        return_offsets_mapping=True,
    )
    owner = torch.where(told.attention_mask > 0, 0, IGNORED)
    objects = torch.full((len(captions), 3, len(_NAMES)), IGNORED)
    ground = torch.empty(len(captions), 3, dtype=torch.int64)
    begins, ends = told.offset_mapping.unbind(-1)
    for row, (caption, scene) in enumerate(zip(captions, scenes, strict=True)):
        back = scene.background
        ground[row] = torch.tensor([BACKGROUNDS.index(back.kind), back.panning, len(scene.objects) - 1])
        for place, thing in enumerate(scene.objects, start=1):
            words = describe_object(thing)
            start = caption.index(words)
            inside = (begins[row] >= start - 1) & (ends[row] <= start + len(words)) & (ends[row] > start)
            owner[row][inside & (owner[row] == 0)] = place
            values = (thing.colour, thing.shape, thing.motion, thing.size)
            objects[row, place] = torch.tensor(
                [names.index(value) for names, value in zip(_NAMES, values, strict=True)]
            )
    return told.input_ids, told.attention_mask, CaptionLabels(owner, objects, ground)


class CaptionReader(nn.Module):
    """Reads what a token speaks of from the encoder's output, `[B, L, width]`."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = [3, *(len(names) for names in _NAMES), len(BACKGROUNDS), 2, 2]
        self.read = nn.Linear(width, sum(self.sizes))

    def forward(self, hidden: Tensor, labels: CaptionLabels) -> Tensor:
        """Sum of the cross-entropies; scalar fp32."""
        owner, *rest = self.read(self.norm(hidden)).float().split(self.sizes, -1)
        word = labels.owner
        loss = _cross_entropy(owner, word)
        truth = labels.objects.gather(1, word.clamp(min=0)[..., None].expand(-1, -1, len(_NAMES)))
        for logits, answer in zip(rest, truth.unbind(-1), strict=False):
            loss = loss + _cross_entropy(logits, answer)
        for logits, answer in zip(rest[len(_NAMES) :], labels.ground.unbind(-1), strict=True):
            loss = loss + _cross_entropy(logits, torch.where(word == IGNORED, word, answer[:, None]))
        return loss


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss / (truth != IGNORED).sum().clamp(min=1)


def encode(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What `WanPipeline` gives the transformer: the last hidden state, padding zeroed, `[B, L, width]`."""
    return encoder(ids, mask).last_hidden_state * mask[..., None]


def load_encoder(folder: Path | None, vocabulary: int) -> UMT5EncoderModel:
    """The encoder (fp32) of a run's shards or of a pipeline folder; without a folder a fresh one."""
    encoder = make_text_encoder(vocabulary)
    if folder is None:
        return encoder
    if (folder / "text_encoder").is_dir():
        shipped = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        encoder.load_state_dict(shipped.state_dict())
    else:
        encoder.load_state_dict(load_shards(folder, "text"))
    return encoder


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
