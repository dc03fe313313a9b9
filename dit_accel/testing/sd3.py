"""Tiny Stable Diffusion 3 models: two blocks, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.image_vae import tiny_image_vae
from dit_accel.testing.seeded import build, seeded


def tiny_sd3_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """An `SD3Transformer2DModel` of two blocks and two heads of 16, as Stable Diffusion 3's.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments: `qk_norm="rms_norm"` makes it as 3.5's, `dual_attention_layers=(0,)`
            beside it as 3.5-medium's.
    """
    from diffusers import SD3Transformer2DModel

    own: dict[str, Any] = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 16,
    }
    return build(SD3Transformer2DModel, seed, **{**own, **config})


def tiny_sd3_inputs(
    transformer: nn.Module, grid: tuple[int, int] = (9, 11), *, text: int = 19, batch: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer: rows and columns of image tokens, and so many of text."""
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": randn(batch, config.in_channels, *(tokens * config.patch_size for tokens in grid)),
        "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 500.0),
    }


def tiny_sd3_pipeline(*, seed: int = 0, transformer: dict[str, Any] | None = None) -> Any:
    """A `StableDiffusion3Pipeline` without text encoders: call it with `prompt_embeds` and `pooled_prompt_embeds`.

    Its autoencoder does not compress, so an image of 18 x 22 pixels is 9 x 11 tokens.

    Args:
        seed: of all weights.
        transformer: further arguments of `tiny_sd3_transformer`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with seeded(seed):
        vae = tiny_image_vae()
    kinds = ("text_encoder", "tokenizer")
    parts = dict.fromkeys(kind + place for kind in kinds for place in ("", "_2", "_3"))
    denoiser = tiny_sd3_transformer(seed=seed + 1, **(transformer or {}))
    pipe = StableDiffusion3Pipeline(denoiser, FlowMatchEulerDiscreteScheduler(), vae, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
