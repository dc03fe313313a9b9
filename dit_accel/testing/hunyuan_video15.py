"""Tiny HunyuanVideo-1.5 models: two blocks, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        "target_size": 64,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HunyuanVideo15Transformer3DModel(**{**own, **config}).eval().requires_grad_(False)


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
