"""The VAE stage: an autoencoder of clips, trained on the tiles that the stock one cuts a clip into.

`AutoencoderKLHunyuanVideo` encodes and decodes 17 frames at a time, whatever is asked of it. The first latent of a tile
holds one frame; behind a clip's start that frame is thrown away, and on decoding the tile begins with a latent of four
frames in its place. Half of the steps show the first kind of tile, half the other; the last tile of a clip is shorter.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tiny_models.autoencoder import CodePace, fit, measure_latents, measure_reconstruction, normalise_latents
from tiny_models.clip_pool import ClipPool, draw_unseen_clip
from tiny_models.shards import save_shards
from torch import Tensor

from .models import PERIOD, TILE, load_vae, make_vae

_SHORT = (5, 13)  # frames of a clip's last tile; few kinds of batches, for cuDNN tries its kernels on each
_LAST, _LARGE = 0.2, 0.15  # shares of the steps


@dataclass(frozen=True)
class VaeOptions:
    """See the command line's help for each field."""

    out: Path
    resume: Path | None
    pace: CodePace
    batch: int
    clips: int
    size: int
    frames: int


def train_vae(options: VaeOptions) -> dict:
    """Train until the time is up, write `vae-*.safetensors` and `vae.json` (the record) to `out`."""
    started, pace = time.time(), options.pace
    torch.manual_seed(pace.seed)
    torch.backends.cudnn.benchmark = True
    rng = random.Random(f"vae-{pace.seed}")
    vae = make_vae()
    if options.resume:
        vae.load_state_dict(load_vae(options.resume).state_dict())
    small = ClipPool(rng, options.clips, options.frames, options.size, pace.device)
    # twice as large, and half as long: everything moves twice as fast
    large = ClipPool(rng, max(1, options.clips // 12), options.frames // 2 + 1, 2 * options.size, pace.device)
    print(f"rendered in {time.time() - started:.0f} s", flush=True)
    tiles = Tiles(small, large, options.batch, random.Random(pace.seed))
    average, record = fit(vae.to(pace.device), tiles.draw, pace, started, tiles.code)
    normalise_latents(
        average, *measure_latents(average, lambda _: small.draw_clips(options.batch, options.frames))
    )
    record |= {name: value for name, value in asdict(pace).items() if name != "device"}
    record |= {name: getattr(options, name) for name in ("batch", "clips", "size", "frames")}
    record["resumed"] = options.resume is not None
    for size, count in ((options.size, 24), (2 * options.size, 4)):
        record[f"reconstruction_{size}"] = measure_reconstruction(
            lambda clip: average.decode(average.encode(clip).latent_dist.mode()).sample,
            lambda rng, size=size: draw_unseen_clip(rng, options.frames, size, pace.device),
            min(count, options.clips),
            "clips",
        )
        print(f"vae at {size} pixels: {record[f'reconstruction_{size}']}", flush=True)
    save_shards(average.state_dict(), options.out, "vae")
    (options.out / "vae.json").write_text(json.dumps(record, indent=1))
    return record


class Tiles:
    """Draws tiles and codes them. Those of an even step begin where a clip does."""

    def __init__(self, small: ClipPool, large: ClipPool, batch: int, rng: random.Random):
        self.small, self.large, self.batch, self.rng = small, large, batch, rng
        self.inside = False

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Clips and weights; behind a clip's start with `PERIOD` frames before the tile."""
        self.inside = bool(step % 2)
        before, kind = PERIOD * self.inside, self.rng.random()
        if kind < _LARGE:
            return self.large.draw_clips(max(1, self.batch // 4), TILE + before)
        frames = self.rng.choice(_SHORT) if kind < _LARGE + _LAST else TILE
        return self.small.draw_clips(self.batch, frames + before)

    def code(
        self, vae: AutoencoderKLHunyuanVideo, clip: Tensor
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """The frames of the tile that the stock autoencoder would keep, and the distribution of all latents."""
        posterior = DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(clip)))
        latents = posterior.sample()[:, :, self.inside :]
        return vae.decoder(vae.post_quant_conv(latents))[:, :, self.inside :], posterior
