"""The transformer stage: flow matching on latents of rendered clips, with the text encoder trained along.

Every GPU renders and encodes its own clips once, then draws batches from them. Ranks are kept equal by averaging
gradients; the learning rate follows the share of the wall-clock budget that is used, so a run always ends its decay.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from dit_accel.quality.scenes import object_masks, render_scenes, sample_scene, write_caption

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

CAPTION_DROP = 0.1
CAPTION_TOKENS = 48
WEIGHT_DECAY = 0.01
OBJECT_WEIGHT = 4.0  # extra weight of latents that show an object, fading out towards pure noise


@dataclass(frozen=True)
class DitOptions:
    """See the command line's help for each field."""

    out: Path
    minutes: float
    vae_from: Path
    resume: Path | None
    batch: int
    large_share: float
    large_batch: int
    rate: float
    clips: int
    compiled: bool
    seed: int
    device: str


class _Student(nn.Module):
    """Text encoder and transformer, called exactly as `WanPipeline` calls them."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text_encoder = make_text_encoder(vocabulary)
        self.transformer = make_transformer()

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
        prompt = hidden.new_zeros(len(ids), PROMPT_LENGTH, hidden.shape[-1])
        prompt[:, : ids.shape[1]] = hidden
        return self.transformer(latents, timestep, prompt, return_dict=False)[0]


class _LatentPool:
    """Clips of one size, rendered and encoded once."""

    def __init__(
        self, vae, tokenizer, rng: random.Random, count: int, size: int, device: str, frames: int = 33
    ):
        mean, std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
            for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        grid = ((frames - 1) // 2 + 1, size // 4, size // 4)
        self.latents = torch.empty(count, vae.config.z_dim, *grid, dtype=torch.float16, device=device)
        self.objects = torch.empty(count, 1, *grid, dtype=torch.bool, device=device)
        captions, chunk = [], max(1, 8 * 128 * 128 // size**2)
        for start in range(0, count, chunk):
            scenes = [sample_scene(rng) for _ in range(min(chunk, count - start))]
            captions += [write_caption(s, rng) for s in scenes]
            clip = render_scenes(scenes, frames, size, size, device)
            with torch.no_grad(), torch.autocast(device.split(":")[0], torch.bfloat16):
                moments = vae.encode(clip).latent_dist.mode().float()
            self.latents[start : start + chunk] = ((moments - mean) / std).half()
            masks = object_masks(scenes, frames, size, size, device)
            first, rest = F.max_pool3d(masks[:, :, :1], (1, 4, 4)), F.max_pool3d(masks[:, :, 1:], (2, 4, 4))
            self.objects[start : start + chunk] = torch.cat([first, rest], 2) > 0
        tokens = tokenizer(
            captions, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
        )
        self.ids, self.mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        empty = tokenizer([""], padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
        self.empty = empty.input_ids.to(device), empty.attention_mask.to(device)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = self.latents.device
        which = torch.randint(len(self.latents), (count,), device=device)
        drop = torch.rand(count, 1, device=device) < CAPTION_DROP
        ids = torch.where(drop, self.empty[0], self.ids[which])
        mask = torch.where(drop, self.empty[1], self.mask[which])
        return self.latents[which].float(), self.objects[which].float(), ids, mask


def train_dit(options: DitOptions) -> None:
    """Train until `options.minutes` have passed; rank 0 writes `dit-*`, `text-*` shards (EMA, fp32) and `dit.json`."""
    started = time.time()
    world, rank, device = _join_ranks(options.device)
    torch.manual_seed(options.seed * 1000 + rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    rng = random.Random(f"{options.seed}-{rank}")
    tokenizer = make_tokenizer()
    vae = load_vae(options.vae_from).to(device)
    pools = [(_LatentPool(vae, tokenizer, rng, options.clips, 128, device), options.batch)]
    if options.large_share > 0:
        pools.append(
            (_LatentPool(vae, tokenizer, rng, max(2, options.clips // 16), 352, device), options.large_batch)
        )
    if rank == 0:
        print(f"rendered and encoded in {time.time() - started:.0f} s on {world} GPUs", flush=True)

    torch.manual_seed(options.seed)  # equal initial weights on every rank
    student = _Student(len(tokenizer)).to(device)
    if options.resume:
        _resume(student, options.resume)
    average = copy.deepcopy(student)
    if options.compiled:
        student.transformer.compile_repeated_blocks(dynamic=False)
    torch.manual_seed(options.seed * 1000 + rank + 1)
    parameters = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=options.rate,
        betas=(0.9, 0.98),
        fused=device.startswith("cuda"),
    )
    history, spent, losses, step, saved = [], [1e-9, 1e-9], [[], []], 0, time.time()
    while True:
        progress = _agree((time.time() - started) / (60 * options.minutes), device)
        if progress >= 1:
            break
        share = _agree(spent[1] / sum(spent), device)
        kind = int(len(pools) > 1 and share < options.large_share)
        began = time.time()
        pool, batch = pools[kind]
        for group in optimiser.param_groups:
            group["lr"] = options.rate * _warm_cosine(progress, step, warm=200)
        loss = _take_step(student, optimiser, parameters, pool.draw(batch), world)
        step += 1
        decay = min(0.999, step / (step + 30))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
        losses[kind].append(loss)
        if device.startswith("cuda") and len(pools) > 1:
            torch.cuda.synchronize()
        spent[kind] += time.time() - began
        if step % 100 == 0:
            means = [round(torch.stack(part).mean().item(), 4) if part else None for part in losses]
            losses = [[], []]
            history.append({"step": step, "seconds": round(time.time() - started, 1), "loss": means})
            if rank == 0:
                print(f"dit step {step} {history[-1]['seconds']} s loss {means}", flush=True)
        if rank == 0 and time.time() - saved > 150:
            _save(options.out, average)
            saved = time.time()
    if rank == 0:
        _save(options.out, average)
        record = {
            "steps": step,
            "minutes": options.minutes,
            "gpus": world,
            "batch": options.batch * world,
            "large_batch": options.large_batch * world,
            "large_share": options.large_share,
            "rate": options.rate,
            "seed": options.seed,
            "resumed": options.resume is not None,
            "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
            "torch": torch.__version__,
            "history": history,
        }
        (options.out / "dit.json").write_text(json.dumps(record))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _take_step(student, optimiser, parameters, drawn, world: int) -> Tensor:
    latents, objects, ids, mask = drawn
    noise = torch.randn_like(latents)
    uniform = torch.rand(len(latents), device=latents.device)
    sigma = FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform)
    # Half of the draws follow the sampler's shifted schedule, half a logit-normal that dwells on the middle.
    middle = torch.sigmoid(torch.randn(len(latents), device=latents.device))
    sigma = torch.where(torch.rand_like(sigma) < 0.5, sigma, middle)
    blend = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = student(blend * noise + (1 - blend) * latents, sigma * 1000, ids, mask)
    error = (velocity.float() - (noise - latents)).square()
    # Which latents show an object is known only once the noise is low: weighting them earlier would bias the mean.
    weight = 1 + OBJECT_WEIGHT * (1 - blend) * objects
    loss = (error * weight).sum() / (weight.sum() * error.shape[1])
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if world > 1:
        _average_gradients(parameters, world)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    if torch.isfinite(norm):  # equal on every rank, since the gradients are
        optimiser.step()
    return error.detach().mean()


def _average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    for p in parameters:  # a parameter that this batch did not reach still takes part
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    torch._foreach_copy_(
        [p.grad for p in parameters],
        [
            part.view_as(p)
            for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)
        ],
    )


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


def _resume(student: _Student, folder: Path) -> None:
    """Take over the weights of a run's shards (fp32), or of an exported pipeline folder (bf16, as it ships)."""
    if (folder / "transformer").is_dir():
        shipped = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
        student.transformer.load_state_dict(shipped.state_dict())
        encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        student.text_encoder.load_state_dict(encoder.state_dict())
        return
    student.transformer.load_state_dict(load_shards(folder, "dit"))
    student.text_encoder.load_state_dict(load_shards(folder, "text"))


def _save(out: Path, average: _Student) -> None:
    save_shards(average.transformer.state_dict(), out, "dit")
    save_shards(average.text_encoder.state_dict(), out, "text")


def _warm_cosine(progress: float, step: int, warm: int) -> float:
    return min(1.0, (step + 1) / warm) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
