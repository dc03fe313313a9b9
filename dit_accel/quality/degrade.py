"""Degradations that a judge of generated clips must see through. Clips are fp32 `[3, F, H, W]` in [0, 1]."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def keep_clean(clip: Tensor, seed: int) -> Tensor:
    return clip


def blur(clip: Tensor, seed: int) -> Tensor:
    """Gaussian blur of 1.5 % of the shorter side (2 pixels at 128): about 25 dB."""
    sigma = 0.0156 * min(clip.shape[-2:])
    reach = int(3 * sigma + 0.5)
    row = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    row = row / row.sum()
    frames = clip.transpose(0, 1)
    for shape, pad in (((1, 1, 1, -1), (reach, reach, 0, 0)), ((1, 1, -1, 1), (0, 0, reach, reach))):
        frames = F.conv2d(
            F.pad(frames, pad, mode="replicate"), row.view(shape).expand(3, *[-1] * 3), groups=3
        )
    return frames.transpose(0, 1)


def add_noise(clip: Tensor, seed: int) -> Tensor:
    """Independent Gaussian noise of standard deviation 0.08 in every pixel: 22 dB."""
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    return (clip + 0.08 * noise).clamp(0, 1)


def compress(clip: Tensor, seed: int) -> Tensor:
    """Every frame through JPEG of quality 25 with halved chroma resolution."""
    from PIL import Image

    frames = []
    for frame in (clip.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy():
        stored = io.BytesIO()
        Image.fromarray(frame).save(stored, format="JPEG", quality=25, subsampling=2)
        frames.append(torch.from_numpy(np.array(Image.open(stored))))
    return torch.stack(frames).permute(3, 0, 1, 2).float() / 255


def wobble(clip: Tensor, seed: int) -> Tensor:
    """What a small diffusion model gets wrong: smooth warps that drift in time, colour shifts, flicker and blur."""
    rng = torch.Generator().manual_seed(seed)
    frames = clip.transpose(0, 1)
    count, _, height, width = frames.shape
    coarse = torch.randn(1, 2, max(count // 8, 2), 5, 5, generator=rng) * 0.03  # about 2 pixels at 128
    warp = F.interpolate(coarse, size=(count, height, width), mode="trilinear", align_corners=True)[0]
    grid = F.affine_grid(torch.eye(2, 3).repeat(count, 1, 1), list(frames.shape), align_corners=False)
    frames = F.grid_sample(
        frames, grid + warp.permute(1, 2, 3, 0), padding_mode="border", align_corners=False
    )
    tint = 0.06 * torch.randn(1, 3, 1, 1, generator=rng) + 0.02 * torch.randn(count, 3, 1, 1, generator=rng)
    soft = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (soft + tint).clamp(0, 1).transpose(0, 1)


@torch.no_grad()
def round_trip(vae, clip: Tensor) -> Tensor:
    """Encode (the mean) and decode with an `AutoencoderKLWan`."""
    scaled = (clip * 2 - 1)[None].to(vae.device, vae.dtype)
    decoded = vae.decode(vae.encode(scaled).latent_dist.mode()).sample
    return (decoded[0].float().cpu() / 2 + 0.5).clamp(0, 1)


DEGRADATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clean": keep_clean,
    "blurred": blur,
    "noisy": add_noise,
    "compressed": compress,
    "wobbling": wobble,
}
