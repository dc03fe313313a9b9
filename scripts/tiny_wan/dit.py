"""The transformer stage: flow matching on latents of rendered clips, with the text encoder trained along.

Every GPU renders and encodes its own clips once, then draws batches from them. Ranks are kept equal by averaging
gradients; the learning rate follows the share of the wall-clock budget that is used, so a run always ends its decay.
Matrices inside the blocks are trained by Muon, everything else by AdamW. A head on a middle layer learns to say what
each token shows (see `labels.py`); its weight falls with the learning rate.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from .attention import BACKENDS, FusedRotaryProcessor, prefer, time_backends
from .clips import ClipPool, Drawn, Mix
from .labels import TokenReader
from .models import (
    FLOW_SHIFT,
    PROMPT_LENGTH,
    load_shards,
    load_vae,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    save_shards,
)
from .muon import BatchedMuon
from .text import CaptionReader, encode, load_encoder

WEIGHT_DECAY = 0.01
READ_AFTER = 4  # the block whose output says what each token shows
READING_WEIGHT = 0.03  # and that of reading captions; none where a run goes on from a model whose heads are not there
MUON_RATE = 2.0  # times the rate of AdamW
GIVEN_TIME, DIVERGED = 300, 4.0  # from this step on, a loss so many times the least one ends a run
OBJECT_WEIGHT = 4.0  # extra weight of latents that show an object, fading out towards pure noise


@dataclass(frozen=True)
class DitOptions:
    """See the command line's help for each field."""

    out: Path
    minutes: float
    vae_from: Path
    text_from: Path
    resume: Path | None
    mix: tuple[Mix, ...]
    rate: float
    final: float
    compiled: bool
    seed: int
    device: str


class _Student(nn.Module):
    """Text encoder and transformer, called exactly as `WanPipeline` calls them."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text_encoder = make_text_encoder(vocabulary)
        self.transformer = make_transformer()
        self.words: Tensor | None = None  # what the encoder said last

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        self.words = encode(self.text_encoder, ids, mask)
        prompt = self.words.new_zeros(len(ids), PROMPT_LENGTH, self.words.shape[-1])
        prompt[:, : ids.shape[1]] = self.words
        return self.transformer(latents, timestep, prompt, return_dict=False)[0]


def train_dit(options: DitOptions) -> None:
    """Train until `options.minutes` have passed; rank 0 writes `dit-*`, `text-*` shards (EMA, fp32) and `dit.json`."""
    started = time.time()
    world, rank, device = _join_ranks(options.device)
    torch.manual_seed(options.seed * 1000 + rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    tokenizer = make_tokenizer()
    vae, rng = load_vae(options.vae_from).to(device), random.Random(f"{options.seed}-{rank}")
    pools = [ClipPool(vae, tokenizer, rng, mix, device) for mix in options.mix]
    if rank == 0:
        print(f"rendered and encoded in {time.time() - started:.0f} s on {world} GPUs", flush=True)

    torch.manual_seed(options.seed)  # equal initial weights on every rank
    student = _Student(len(tokenizer)).to(device)
    encoder = load_encoder(options.text_from, len(tokenizer))
    student.text_encoder.load_state_dict(encoder.state_dict())
    if options.resume:
        _resume(student.transformer, options.resume)
    readers = _make_readers(student, options).to(device)
    average = copy.deepcopy(student)
    tap = _Tap(student.transformer.blocks[READ_AFTER])
    for block in student.transformer.blocks:
        block.attn1.set_processor(FusedRotaryProcessor())
    attention = _fastest_attention(student, device, rank)
    if options.compiled:
        # The bound methods, so that the hook of the tap stays outside.
        for module in (student.text_encoder, *student.transformer.blocks):
            module.forward = torch.compile(module.forward, dynamic=False)
    torch.manual_seed(options.seed * 1000 + rank + 1)
    learner = _Learner(student, readers, tap, options, world)
    order = random.Random(options.seed)  # the same kinds of batches in the same order on every rank
    history, losses, step, progress, saved, best = [], [[] for _ in pools], 0, 0.0, time.time(), math.inf
    with attention:
        while progress < 1:
            kind = order.choices(range(len(pools)), [mix.share for mix in options.mix])[0]
            losses[kind].append(learner.take_step(pools[kind].draw(options.mix[kind].batch), progress, step))
            step += 1
            decay = min(0.999, step / (step + 30))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
            if step % (20 if device.startswith("cuda") else 1) == 0:  # agreeing makes the GPU wait
                progress = _agree((time.time() - started) / (60 * options.minutes), device)
            if step % 100 == 0:
                means = [torch.stack(part).mean(0).tolist() if part else [None] * 3 for part in losses]
                losses = [[] for _ in pools]
                seconds = round(time.time() - started, 1)
                history.append({"step": step, "seconds": seconds, "loss": [m[0] for m in means]})
                now = _agree(sum(m[0] or 0.0 for m in means), device)
                best = min(best, now)
                if step >= GIVEN_TIME and now > DIVERGED * best:
                    raise SystemExit(
                        f"the run diverges: by step {step} the loss has risen from {best:.3f} to {now:.3f}. Give a "
                        "smaller --rate, or larger batches in --mix."
                    )
                if rank == 0:
                    told = ", ".join(f"{m[0]:.4f} ({m[1]:.2f} {m[2]:.3f})" if m[0] else "-" for m in means)
                    print(f"dit step {step} {seconds} s, loss (reading tokens, words): {told}", flush=True)
            if rank == 0 and time.time() - saved > 150:
                _save(options.out, average, readers)
                saved = time.time()
    if rank == 0:
        _save(options.out, average, readers)
        record = {
            "steps": step,
            "mix": [asdict(mix) for mix in options.mix],
            **{name: getattr(options, name) for name in ("minutes", "rate", "final", "seed")},
            "reading": learner.reading_weight,
            "gpus": world,
            "resumed": options.resume is not None,
            "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
            "torch": torch.__version__,
            "history": history,
        }
        (options.out / "dit.json").write_text(json.dumps(record))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _make_readers(student: _Student, options: DitOptions) -> nn.ModuleDict:
    """The training-only heads: `reader` of the transformer's tokens, `words` of the encoder's."""
    readers = nn.ModuleDict(
        {
            "reader": TokenReader(_width(student)),
            "words": CaptionReader(student.text_encoder.config.d_model),
        }
    )
    for name, head in readers.items():
        if _has_head(options, name):
            head.load_state_dict(load_shards(_head_folder(options, name), name))
    return readers


def _head_folder(options: DitOptions, name: str) -> Path | None:
    return options.resume if name == "reader" else options.text_from


def _has_head(options: DitOptions, name: str) -> bool:
    """Whether a head was trained before; a pipeline folder has none."""
    folder = _head_folder(options, name)
    return folder is not None and (folder / f"{name}-1.safetensors").is_file()


class _Tap:
    """Keeps what a block returned last."""

    def __init__(self, block: nn.Module):
        self.hidden: Tensor | None = None
        block.register_forward_hook(self._keep)

    def _keep(self, _module, _inputs, output: Tensor) -> None:
        self.hidden = output


class _Learner:
    """One step of training: losses, gradients averaged over ranks and clipped, two optimisers."""

    def __init__(self, student: _Student, readers: nn.ModuleDict, tap: _Tap, options: DitOptions, world: int):
        self.student, self.readers, self.tap, self.options, self.world = student, readers, tap, options, world
        # Heads that know nothing would first of all bend a trained model to themselves.
        known = options.resume is None or all(_has_head(options, name) for name in readers)
        self.reading_weight = READING_WEIGHT if known else 0.0
        self.parameters = [*student.parameters(), *readers.parameters()]
        inner = [p for p in student.transformer.blocks.parameters() if p.ndim == 2]
        known = {id(p) for p in inner}
        outer = [p for p in self.parameters if id(p) not in known]
        groups = [
            {"params": [p for p in outer if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in outer if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimisers = [
            torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=outer[0].is_cuda),
            BatchedMuon(inner, lr=options.rate, weight_decay=WEIGHT_DECAY),
        ]

    def take_step(self, drawn: Drawn, progress: float, step: int) -> Tensor:
        """Losses `[3]`: of the velocity (unweighted mean square), of reading tokens, and of reading words."""
        share = _cosine(progress, self.options.final)
        latents = drawn.latents
        noise = torch.randn_like(latents)
        sigma = _draw_sigma(len(latents), latents.device)
        blend = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast(latents.device.type, torch.bfloat16):
            blended = blend * noise + (1 - blend) * latents
            velocity = self.student(blended, sigma * 1000, drawn.ids, drawn.mask)
            tokens = self.readers["reader"](self.tap.hidden, drawn.labels)
            words = self.readers["words"](self.student.words, drawn.words)
        error = (velocity.float() - (noise - latents)).square()
        # Which latents show an object is known only once the noise is low: weighting them earlier would bias the mean.
        weight = 1 + OBJECT_WEIGHT * (1 - blend) * drawn.objects
        loss = (error * weight).sum() / (weight.sum() * error.shape[1])
        loss = loss + self.reading_weight * share * (tokens + words)
        loss.backward()
        self._average_and_clip()
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                rate = self.options.rate * (MUON_RATE if isinstance(optimiser, BatchedMuon) else 1.0)
                group["lr"] = rate * share * min(1.0, (step + 1) / 200)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return torch.stack([error.detach().mean(), tokens.detach(), words.detach()])

    @torch.no_grad()
    def _average_and_clip(self) -> None:
        for p in self.parameters:  # a parameter that this batch did not reach still takes part
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in self.parameters])
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        norm = flat.norm()  # equal on every rank; a step that is not finite becomes one without gradient
        scale = torch.where(norm.isfinite(), (1 / (norm + 1e-6)).clamp(max=1.0), torch.zeros_like(norm))
        flat = flat.nan_to_num(0.0, 0.0, 0.0) * scale
        parts = flat.split([p.numel() for p in self.parameters])
        torch._foreach_copy_(
            [p.grad for p in self.parameters],
            [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)],
        )


def _draw_sigma(count: int, device: torch.device) -> Tensor:
    """Half of the draws follow the sampler's shifted schedule, a quarter dwell on the middle, where looks are learned,
    and a quarter on the noisiest tenth, where it is settled which object goes where: below it the noisy clip itself
    tells (the reading head is right on 99 % of the tokens at 0.9, on 70 to 85 % at 1).
    """
    uniform = torch.rand(count, device=device)
    shifted = FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)
    middle = torch.sigmoid(torch.randn(count, device=device))
    kind = torch.rand(count, device=device)
    return torch.where(kind < 0.5, shifted, torch.where(kind < 0.75, middle, 0.9 + 0.1 * uniform))


def _fastest_attention(student: _Student, device: str, rank: int):
    """A context that prefers the faster fused attention, measured on the student's own layer at the default size."""
    if not device.startswith("cuda"):
        return contextlib.nullcontext()
    transformer = student.transformer
    latents = torch.empty(1, transformer.config.in_channels, 17, 32, 32, device=device)
    rotary = transformer.rope(latents)
    hidden = torch.randn(24, 17 * 16 * 16, _width(student), device=device, requires_grad=True)

    def attend() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return transformer.blocks[0].attn1(hidden, None, None, rotary)

    seconds = time_backends(attend)
    best = BACKENDS[int(_agree(float(seconds[1] < seconds[0]), device))]
    student.zero_grad(set_to_none=True)
    if rank == 0:
        told = ", ".join(f"{b.name} {s * 1e3:.2f} ms" for b, s in zip(BACKENDS, seconds, strict=True))
        print(f"a layer's attention, forward and backward: {told}; taking {best.name}", flush=True)
    return prefer(best)


def _join_ranks(device: str) -> tuple[int, int, str]:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return world, rank, device


def _agree(value: float, device: str) -> float:
    """Rank 0's value on every rank: clocks differ, and a rank that stops alone would hang the others."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, device=device, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()


def _width(student: _Student) -> int:
    return student.transformer.config.num_attention_heads * student.transformer.config.attention_head_dim


def _resume(transformer: WanTransformer3DModel, folder: Path) -> None:
    """Take over the weights of a run's shards (fp32), or of an exported pipeline folder (bf16, as it ships)."""
    if (folder / "transformer").is_dir():
        shipped = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
        transformer.load_state_dict(shipped.state_dict())
    else:
        transformer.load_state_dict(load_shards(folder, "dit"))


def _save(out: Path, average: _Student, readers: nn.ModuleDict) -> None:
    for name, head in readers.items():
        save_shards(head.state_dict(), out, name)
    save_shards(average.transformer.state_dict(), out, "dit")
    save_shards(average.text_encoder.state_dict(), out, "text")


def _cosine(progress: float, final: float) -> float:
    """Falls from 1 at the start to `final` at the end."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
