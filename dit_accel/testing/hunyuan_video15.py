"""Tiny HunyuanVideo-1.5 models: two blocks, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.seeded import build, seeded
from dit_accel.testing.siglip import tiny_siglip


def tiny_hunyuan_video15_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `HunyuanVideo15Transformer3DModel` of two blocks and two heads of 16.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import HunyuanVideo15Transformer3DModel

    own: dict[str, Any] = {
        "in_channels": 9,  # noise, latents of the image and their mask
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 24,
        "text_embed_2_dim": 12,
        "image_embed_dim": 20,
        "rope_axes_dim": (4, 6, 6),
        "target_size": 96,  # image to video then makes 80 x 112 pixels of an image of that shape
    }
    return build(HunyuanVideo15Transformer3DModel, seed, **{**own, **config})


def tiny_hunyuan_video15_inputs(
    transformer: nn.Module,
    grid: tuple[int, int, int] = (3, 5, 7),
    *,
    text: int = 13,
    valid: int | tuple[int, ...] | None = None,
    glyphs: int = 6,
    valid_glyphs: int | tuple[int, ...] = 3,
    image: bool = False,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer on a grid of so many tokens.

    Args:
        text: text tokens of the language model.
        valid: how many of them are no padding, for all batch rows or each; None: all.
        glyphs: text tokens of ByT5.
        valid_glyphs: likewise.
        image: whether there is an image, as in image to video; else its 5 tokens are zeros, which the model masks.
    """
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def mask(tokens: int, lengths: int | tuple[int, ...]) -> Tensor:
        return (torch.arange(tokens) < torch.as_tensor(lengths).expand(batch)[:, None]).long()

    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    sizes = [tokens * edge for tokens, edge in zip(grid, patch, strict=True)]
    return {
        "hidden_states": randn(batch, config.in_channels, *sizes),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, text, config.text_embed_dim),
        "encoder_attention_mask": mask(text, text if valid is None else valid),
        "encoder_hidden_states_2": randn(batch, glyphs, config.text_embed_2_dim),
        "encoder_attention_mask_2": mask(glyphs, valid_glyphs),
        "image_embeds": randn(batch, 5, config.image_embed_dim) * image,
    }


def tiny_hunyuan_video15_pipeline(
    *, i2v: bool = False, seed: int = 0, transformer: dict[str, Any] | None = None
) -> Any:
    """A `HunyuanVideo15Pipeline`, or `HunyuanVideo15ImageToVideoPipeline`, without text encoders.

    Call it with `prompt_embeds`, `prompt_embeds_2`, their masks and the same for the negative prompt. Its autoencoder
    compresses 4x in time and 16x in space, as the model's does: 9 frames of 80 x 112 pixels are 3 x 5 x 7 tokens.

    Args:
        i2v: image to video, with an image encoder of 9 tokens.
        seed: of all weights.
        transformer: further arguments of `tiny_hunyuan_video15_transformer`.
    """
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15ImageToVideoPipeline,
        HunyuanVideo15Pipeline,
    )

    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    with seeded(seed):
        parts["vae"] = AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        ).eval()
        if i2v:
            parts |= tiny_siglip(20, patches=3)
    parts["transformer"] = tiny_hunyuan_video15_transformer(seed=seed + 1, **(transformer or {}))
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=5.0)
    parts["guider"] = ClassifierFreeGuidance(guidance_scale=3.0)
    pipe = (HunyuanVideo15ImageToVideoPipeline if i2v else HunyuanVideo15Pipeline)(**parts)
    pipe.vision_num_semantic_tokens = 9
    pipe.set_progress_bar_config(disable=True)
    return pipe
