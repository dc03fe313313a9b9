"""The transformer stage: flow matching on latents of rendered clips, with the text encoder trained along."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from tiny_models.clips import Mix, fill_pool
from tiny_models.learner import Heads, Student
from tiny_models.pool import Drawn
from tiny_models.ranks import Ranks
from tiny_models.shards import load_shards, save_shards
from tiny_models.text import load_encoder
from tiny_models.training import Pace, train
from torch import Tensor, nn

from .attention import FusedRotaryProcessor
from .clips import make_coder
from .models import FLOW_SHIFT, PROMPT_LENGTH, load_vae, make_tokenizer, make_transformer
from .text import encode

READ_AFTER = 4  # the block whose output says what each token shows


@dataclass(frozen=True)
class DitOptions:
    """See the command line's help for each field."""

    out: Path
    vae_from: Path
    text_from: Path
    resume: Path | None
    mix: tuple[Mix, ...]
    pace: Pace
    device: str


class WanStudent(Student):
    """Text encoder and transformer, called exactly as `WanPipeline` calls them."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.text_encoder = encoder
        self.transformer = make_transformer()

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.blocks)

    def forward(self, latents: Tensor, sigma: Tensor, drawn: Drawn) -> Tensor:
        self.words = encode(self.text_encoder, drawn.ids, drawn.mask)
        prompt = self.words.new_zeros(len(drawn.ids), PROMPT_LENGTH, self.words.shape[-1])
        prompt[:, : drawn.ids.shape[1]] = self.words
        return self.transformer(latents, sigma * 1000, prompt, return_dict=False)[0]


def train_dit(options: DitOptions) -> None:
    """Train until the time is up; rank 0 writes `dit-*`, `text-*` shards (EMA, fp32) and `dit.json`."""
    started = time.time()
    ranks = Ranks.join(options.device)
    torch.manual_seed(options.pace.seed * 1000 + ranks.rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    tokenizer = make_tokenizer()
    vae, rng = load_vae(options.vae_from).to(ranks.device), random.Random(f"{options.pace.seed}-{ranks.rank}")
    coder = make_coder(vae, ranks.device)
    pools = [fill_pool(coder, tokenizer, rng, mix, ranks.device) for mix in options.mix]
    if ranks.first:
        print(f"rendered and encoded in {time.time() - started:.0f} s on {ranks.world} GPUs", flush=True)

    torch.manual_seed(options.pace.seed)  # equal initial weights on every rank
    student = WanStudent(load_encoder(options.text_from, len(tokenizer)))
    if options.resume:
        _resume(student.transformer, options.resume)
    heads = Heads.make(student, options.resume, options.text_from)
    student.to(ranks.device)
    heads.modules.to(ranks.device)
    for block in student.blocks:
        block.attn1.set_processor(FusedRotaryProcessor())
    record = train(
        student,
        heads,
        pools,
        options.mix,
        options.pace,
        ranks,
        started=started,
        shift=FLOW_SHIFT,
        tapped=READ_AFTER,
        tokens=coder.count_tokens(options.mix[0]),
        save=lambda average, heads: _save(options.out, average, heads),
    )
    if ranks.first:
        record["resumed"] = options.resume is not None
        (options.out / "dit.json").write_text(json.dumps(record))
    ranks.leave()


def _resume(transformer: WanTransformer3DModel, folder: Path) -> None:
    """Take over the weights of a run's shards (fp32), or of an exported pipeline folder (bf16, as it ships)."""
    if (folder / "transformer").is_dir():
        shipped = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
        transformer.load_state_dict(shipped.state_dict())
    else:
        transformer.load_state_dict(load_shards(folder, "dit"))


def _save(out: Path, average: Student, heads: Heads) -> None:
    for name, head in heads.modules.items():
        save_shards(head.state_dict(), out, name)
    save_shards(average.transformer.state_dict(), out, "dit")
    save_shards(average.text_encoder.state_dict(), out, "text")
