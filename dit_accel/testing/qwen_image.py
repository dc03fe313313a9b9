"""Tiny Qwen-Image models: two blocks, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.seeded import build, seeded


def tiny_qwen_image_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `QwenImageTransformer2DModel` of two blocks and two heads of 16.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import QwenImageTransformer2DModel

    own: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    return build(QwenImageTransformer2DModel, seed, **{**own, **config})


def tiny_qwen_image_inputs(
    transformer: nn.Module,
    grid: tuple[int, int] = (9, 11),
    *,
    references: tuple[tuple[int, int], ...] = (),
    text: int = 19,
    valid: int | tuple[int, ...] | None = None,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer.

    Args:
        grid: rows and columns of image tokens.
        references: rows and columns of each further image, whose tokens stand behind the first one's.
        text: text tokens.
        valid: how many of them are no padding, for all batch rows or each; None: no mask is given.
    """
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    images = [(1, *size) for size in (grid, *references)]
    tokens = sum(rows * columns for _, rows, columns in images)
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, tokens, config.in_channels),
        "encoder_hidden_states": randn(batch, text, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [images] * batch,
    }
    if valid is not None:
        inputs["encoder_hidden_states_mask"] = (
            torch.arange(text) < torch.as_tensor(valid).expand(batch)[:, None]
        )
    return inputs


def tiny_qwen_image_pipeline(*, seed: int = 0) -> Any:
    """A `QwenImagePipeline` without a text encoder: call it with `prompt_embeds`.

    Its autoencoder compresses by 2, so an image of 36 x 44 pixels is 9 x 11 tokens.
    """
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    with seeded(seed):
        vae = AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ).eval()  # fmt: skip
    parts = {"text_encoder": None, "tokenizer": None}
    transformer = tiny_qwen_image_transformer(seed=seed + 1)
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
