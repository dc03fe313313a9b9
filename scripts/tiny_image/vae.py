"""The VAE stage: an autoencoder of stills whose latents have mean 0 and deviation 1 in every channel."""

from __future__ import annotations

import copy
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tiny_models.shards import save_shards
from torch import Tensor, nn

from dit_accel.quality.scenes import Scene, object_masks, render_scenes, sample_still

from .models import LARGEST, load_vae, make_vae

KL_WEIGHT = 2e-5
OBJECT_WEIGHT = 4.0
CROP = 128  # pixels; convolutions see no more of a larger image


@dataclass(frozen=True)
class VaeOptions:
    """See the command line's help for each field."""

    out: Path
    resume: Path | None
    minutes: float
    rate: float
    batch: int
    images: int
    size: int
    seed: int
    device: str


def train_vae(options: VaeOptions) -> dict:
    """Train until the time is up, write `vae-*.safetensors` and `vae.json` (the record) to `out`."""
    started, device = time.time(), options.device
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True
    rng = random.Random(f"vae-{options.seed}")
    vae = make_vae()
    if options.resume:
        vae.load_state_dict(load_vae(options.resume).state_dict())
    vae = vae.to(device)
    average = copy.deepcopy(vae)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=options.rate, betas=(0.9, 0.99))
    pools = [_ImagePool(rng, options.images, size, device) for size in (options.size, options.size // 2)]
    print(f"rendered in {time.time() - started:.0f} s", flush=True)
    history, step, progress = [], 0, 0.0
    while progress < 1:
        pixels, weight = pools[step % 2].draw(options.batch)
        share = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = options.rate * share * min(1.0, (step + 1) / 100)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        error = (output - pixels).square()
        mean, spread = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        recon = (error * weight).mean() / weight.mean() + 0.02 * (output - pixels).abs().mean()
        optimiser.zero_grad(set_to_none=True)
        (recon + KL_WEIGHT * kl).backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(0.998, step / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        progress = (time.time() - started) / (60 * options.minutes)
        if step % 100 == 0 or progress >= 1:
            psnr = round(10 * math.log10(4 / error.mean().item()), 2)
            history.append({"step": step, "seconds": round(time.time() - started, 1), "psnr": psnr})
            print(f"vae {history[-1]} kl {kl.item():.2f} norm {norm.item():.2f}", flush=True)
    average.eval()
    normalise_latents(average, *measure_latents(average, pools[0], options.batch))
    record = {
        **{name: getattr(options, name) for name in ("minutes", "rate", "batch", "images", "size", "seed")},
        "resumed": options.resume is not None,
        "kl_weight": KL_WEIGHT,
        "steps": step,
        "history": history,
    }
    for size in sorted({options.size, LARGEST}):
        record[f"reconstruction_{size}"] = measure_reconstruction(
            average, min(48, options.images), size, device
        )
        print(f"vae at {size} pixels: {record[f'reconstruction_{size}']}", flush=True)
    save_shards(average.state_dict(), options.out, "vae")
    (options.out / "vae.json").write_text(json.dumps(record, indent=1))
    return record


class _ImagePool:
    """Rendered stills kept as uint8 with their object masks, from which crops are drawn."""

    def __init__(self, rng: random.Random, count: int, size: int, device: str):
        self.pixels = torch.empty(count, 3, size, size, dtype=torch.uint8, device=device)
        self.masks = torch.empty(count, 1, size, size, dtype=torch.bool, device=device)
        for i in range(count):
            pixels, mask = _draw_still(sample_still(rng), size, device)
            self.pixels[i], self.masks[i] = ((pixels[0] + 1) * 127.5).round().clamp(0, 255).byte(), mask[0]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] and weights, `[count, 3 or 1, h, w]`; the crop is the same for all."""
        size = self.pixels.shape[-1]
        crop = min(CROP, size)
        top, left = (2 * int(torch.randint((size - crop) // 2 + 1, (1,))) for _ in range(2))
        which = torch.randint(len(self.pixels), (count,), device=self.pixels.device)
        place = (which, slice(None), slice(top, top + crop), slice(left, left + crop))
        return self.pixels[place].float() / 127.5 - 1, 1 + OBJECT_WEIGHT * self.masks[place].float()


def _draw_still(scene: Scene, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Pixels `[1, 3, size, size]` in [-1, 1] and where objects are, bool `[1, 1, size, size]`."""
    pixels = render_scenes([scene], 1, size, size, device)[:, :, 0]
    return pixels, object_masks([scene], 1, size, size, device)[:, :, 0] > 0.5


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, pool: _ImagePool, batch: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, fp32 `[C]`."""
    latents = torch.cat([vae.encode(pool.draw(batch)[0]).latent_dist.mode() for _ in range(8)])
    flat = latents.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.std(1)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Give latents that have this `mean` and `std`, `[C]`, mean 0 and deviation 1; images stay what they are.

    The pipelines know one shift and one scale for all channels; the 1 x 1 convolutions on both sides of the latents
    can hold one of each for every channel, exactly.
    """
    count = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:count] /= std[:, None, None, None]
    into.bias[:count] = (into.bias[:count] - mean) / std
    into.bias[count:] -= 2 * std.log()  # the second half is the logarithm of the variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[:, None, None]


@torch.no_grad()
def measure_reconstruction(vae: AutoencoderKL, count: int, size: int, device: str) -> dict:
    """PSNR in dB over unseen images, overall and inside the objects (fp32, clamped as pipelines do)."""
    rng = random.Random(990_000)
    overall, inside = [], []
    for _ in range(count):
        pixels, mask = _draw_still(sample_still(rng, held_out=True), size, device)
        output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((output - pixels) / 2).square()
        overall.append(-10 * math.log10(error.mean().item()))
        inside.append(-10 * math.log10(error[mask.expand_as(error)].mean().item()))
    return {
        "images": count,
        "psnr": round(sum(overall) / count, 2),
        "psnr_min": round(min(overall), 2),
        "psnr_objects": round(sum(inside) / count, 2),
        "psnr_objects_min": round(min(inside), 2),
    }
