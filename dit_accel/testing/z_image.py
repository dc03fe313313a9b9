"""Tiny Z-Image models: three main layers, a layer in each refiner, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.image_vae import tiny_image_vae
from dit_accel.testing.seeded import seeded


def tiny_z_image_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `ZImageTransformer2DModel` of three main layers and two heads of 16.

    The tokens that fill up image and caption are random, where the class has zeros.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import ZImageTransformer2DModel

    own: dict[str, Any] = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 64, 64],
    }
    with seeded(seed):
        transformer = ZImageTransformer2DModel(**{**own, **config})
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            nn.init.normal_(token)
    return transformer.eval().requires_grad_(False)


def tiny_z_image_inputs(
    transformer: nn.Module,
    grid: tuple[int, int] = (9, 11),
    *,
    text: int | tuple[int, ...] = 19,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer.

    Args:
        grid: rows and columns of image tokens.
        text: caption tokens, of all batch rows or of each.
    """
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config
    lengths = (text,) * batch if isinstance(text, int) else text

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": [randn(config.in_channels, 1, 2 * grid[0], 2 * grid[1]) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [randn(length, config.cap_feat_dim) for length in lengths],
    }


def tiny_z_image_pipeline(*, seed: int = 0) -> Any:
    """A `ZImagePipeline` without a text encoder: call it with `prompt_embeds`, a list of `[tokens, 24]`.

    Its autoencoder does not compress, so an image of 18 x 22 pixels is 9 x 11 tokens.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    with seeded(seed):
        vae = tiny_image_vae()
    parts = {"text_encoder": None, "tokenizer": None}
    transformer = tiny_z_image_transformer(seed=seed + 1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = ZImagePipeline(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
