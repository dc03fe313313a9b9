"""What the trainings of the autoencoders share: the loop, latents of mean 0 and deviation 1, PSNR of unseen scenes."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KL_WEIGHT = 2e-5
OBJECT_WEIGHT = 4.0  # extra weight of pixels that show an object

Draw = Callable[[int], tuple[Tensor, Tensor]]  # step -> pixels in [-1, 1] and their weights


@dataclass(frozen=True)
class CodePace:
    """How long and how fast to train. See the command line's help for each field."""

    minutes: float
    rate: float
    seed: int
    device: str


def code_whole(vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Any]:
    """Encode and decode in one pass; the decoded pixels and the distribution of latents they were drawn from."""
    posterior = vae.encode(pixels).latent_dist
    return vae.decode(posterior.sample()).sample, posterior


def fit(
    vae: nn.Module,
    draw: Draw,
    pace: CodePace,
    started: float,
    code: Callable[[nn.Module, Tensor], tuple[Tensor, Any]] = code_whole,
) -> tuple[nn.Module, dict]:
    """Train until `pace.minutes` after `started`.

    Args:
        code: as `code_whole`; of a clip it may decode the last frames only.

    Returns:
        The average of the weights, in `eval`, and the record: steps and PSNR over time.
    """
    average = copy.deepcopy(vae)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=pace.rate, betas=(0.9, 0.99))
    history, step, progress = [], 0, 0.0
    while progress < 1:
        pixels, weight = draw(step)
        share = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = pace.rate * share * min(1.0, (step + 1) / 100)
        with torch.autocast(pace.device.split(":")[0], torch.bfloat16):
            output, posterior = code(vae, pixels)
        output = output.float()
        pixels, weight = (x[:, :, -output.shape[2] :] for x in (pixels, weight))
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
        progress = (time.time() - started) / (60 * pace.minutes)
        if step % 100 == 0 or progress >= 1:
            psnr = round(10 * math.log10(4 / error.mean().item()), 2)
            history.append({"step": step, "seconds": round(time.time() - started, 1), "psnr": psnr})
            print(f"vae {history[-1]} kl {kl.item():.2f} norm {norm.item():.2f}", flush=True)
    return average.eval(), {"steps": step, "kl_weight": KL_WEIGHT, "history": history}


@torch.no_grad()
def measure_latents(vae: nn.Module, draw: Draw, count: int = 8) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over so many batches, fp32 `[C]`."""
    latents = [vae.encode(draw(step)[0]).latent_dist.mode() for step in range(count)]
    flat = torch.cat([x.transpose(0, 1).flatten(1) for x in latents], 1)
    return flat.mean(1), flat.std(1)


@torch.no_grad()
def normalise_latents(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Give latents that have this `mean` and `std`, `[C]`, mean 0 and deviation 1; what they show stays what it is.

    The pipelines know one shift and one scale for all channels; the convolutions of size 1 on both sides of the latents
    can hold one of each for every channel, exactly.
    """
    count = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    ones = [1] * (into.weight.ndim - 2)
    into.weight[:count] /= std.view(-1, 1, *ones)
    into.bias[:count] = (into.bias[:count] - mean) / std
    into.bias[count:] -= 2 * std.log()  # the second half is the logarithm of the variance
    out.bias += out.weight.flatten(1) @ mean
    out.weight *= std.view(1, -1, *ones)


@torch.no_grad()
def measure_reconstruction(
    code: Callable[[Tensor], Tensor],
    draw_scene: Callable[[random.Random], tuple[Tensor, Tensor]],
    count: int,
    noun: str,
) -> dict:
    """PSNR in dB over unseen images or clips, overall and inside the objects (fp32, clamped as pipelines do).

    Args:
        code: pixels to what they are decoded to.
        draw_scene: the pixels of one in [-1, 1] and where its objects are, bool.
        noun: what they are called in the record.
    """
    rng = random.Random(990_000)
    overall, inside = [], []
    for _ in range(count):
        pixels, mask = draw_scene(rng)
        error = ((code(pixels).clamp(-1, 1) - pixels) / 2).square()
        overall.append(-10 * math.log10(error.mean().item()))
        inside.append(-10 * math.log10(error[mask.expand_as(error)].mean().item()))
    return {
        noun: count,
        "psnr": round(sum(overall) / count, 2),
        "psnr_min": round(min(overall), 2),
        "psnr_objects": round(sum(inside) / count, 2),
        "psnr_objects_min": round(min(inside), 2),
    }
