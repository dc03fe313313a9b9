"""Tiny HunyuanVideo models: one dual and one single block, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.seeded import build, seeded

# what makes a model of HunyuanVideo's shape tiny
TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 24,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def tiny_hunyuan_video_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `HunyuanVideoTransformer3DModel` of one dual and one single block, two heads of 16.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import HunyuanVideoTransformer3DModel

    return build(HunyuanVideoTransformer3DModel, seed, **{**TINY, **config})


def tiny_hunyuan_video_inputs(
    transformer: nn.Module,
    grid: tuple[int, int, int] = (3, 5, 7),
    *,
    text: int = 19,
    valid: int | tuple[int, ...] | None = None,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer on a grid of so many tokens.

    Args:
        text: text tokens.
        valid: how many of them are no padding, for all batch rows or each; None: all.
    """
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    sizes = [tokens * edge for tokens, edge in zip(grid, patch, strict=True)]
    lengths = torch.as_tensor(text if valid is None else valid).expand(batch)
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, config.in_channels, *sizes),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, text, config.text_embed_dim),
        "encoder_attention_mask": (torch.arange(text) < lengths[:, None]).long(),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 6000.0)
    return inputs


def tiny_hunyuan_video_vae(*, seed: int = 0) -> nn.Module:
    """An `AutoencoderKLHunyuanVideo` that compresses 4x in time and 8x in space, as HunyuanVideo's does."""
    from diffusers import AutoencoderKLHunyuanVideo

    kinds = {f"{way.lower()}_block_types": (f"HunyuanVideo{way}Block3D",) * 4 for way in ("Down", "Up")}
    with seeded(seed):
        return AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            mid_block_add_attention=False,
            **kinds,
        ).eval()


def tiny_hunyuan_video_pipeline(
    *, image_condition_type: str | None = None, seed: int = 0, transformer: dict[str, Any] | None = None
) -> Any:
    """A `HunyuanVideoPipeline`, or `HunyuanVideoImageToVideoPipeline`, without text encoders.

    Call it with `prompt_embeds`, `pooled_prompt_embeds`, `prompt_attention_mask` and, for true guidance, the same of
    the negative prompt: 9 frames of 80 x 112 pixels are 3 x 5 x 7 tokens.

    Args:
        image_condition_type: None for text to video; "latent_concat" or "token_replace" for image to video.
        seed: of all weights.
        transformer: further arguments of `tiny_hunyuan_video_transformer`.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoImageToVideoPipeline,
        HunyuanVideoPipeline,
    )

    config: dict[str, Any] = {"image_condition_type": image_condition_type}
    if image_condition_type == "latent_concat":
        config["in_channels"] = 9  # noise, latents of the image and their mask
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    parts["vae"] = tiny_hunyuan_video_vae(seed=seed)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts["transformer"] = tiny_hunyuan_video_transformer(seed=seed + 1, **config, **(transformer or {}))
    if image_condition_type is None:
        pipe: Any = HunyuanVideoPipeline(**parts)
    else:
        pipe = HunyuanVideoImageToVideoPipeline(**parts, image_processor=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
