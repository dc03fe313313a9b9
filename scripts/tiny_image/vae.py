"""The VAE stage: an autoencoder of stills whose latents have mean 0 and deviation 1 in every channel."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models.autoencoder import (
    OBJECT_WEIGHT,
    CodePace,
    fit,
    measure_latents,
    measure_reconstruction,
    normalise_latents,
)
from tiny_models.shards import save_shards
from torch import Tensor

from dit_accel.quality.scenes import Scene, object_masks, render_scenes, sample_still

from .models import LARGEST, load_vae, make_vae

CROP = 128  # pixels; convolutions see no more of a larger image


@dataclass(frozen=True)
class VaeOptions:
    """See the command line's help for each field."""

    out: Path
    resume: Path | None
    pace: CodePace
    batch: int
    images: int
    size: int


def train_vae(options: VaeOptions) -> dict:
    """Train until the time is up, write `vae-*.safetensors` and `vae.json` (the record) to `out`."""
    started, pace, device = time.time(), options.pace, options.pace.device
    torch.manual_seed(pace.seed)
    torch.backends.cudnn.benchmark = True
    rng = random.Random(f"vae-{pace.seed}")
    vae = make_vae()
    if options.resume:
        vae.load_state_dict(load_vae(options.resume).state_dict())
    pools = [_ImagePool(rng, options.images, size, device) for size in (options.size, options.size // 2)]
    print(f"rendered in {time.time() - started:.0f} s", flush=True)
    average, record = fit(vae.to(device), lambda step: pools[step % 2].draw(options.batch), pace, started)
    normalise_latents(average, *measure_latents(average, lambda _: pools[0].draw(options.batch)))
    record |= {name: getattr(pace, name) for name in ("minutes", "rate", "seed")}
    record |= {name: getattr(options, name) for name in ("batch", "images", "size")}
    record["resumed"] = options.resume is not None
    for size in sorted({options.size, LARGEST}):
        record[f"reconstruction_{size}"] = measure_reconstruction(
            lambda pixels: average.decode(average.encode(pixels).latent_dist.mode()).sample,
            lambda rng, size=size: _draw_still(sample_still(rng, held_out=True), size, device),
            min(48, options.images),
            "images",
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
