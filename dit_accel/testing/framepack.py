"""Tiny FramePack models: one dual and one single block, two heads of 16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.testing.hunyuan_video import TINY, tiny_hunyuan_video_inputs, tiny_hunyuan_video_vae
from dit_accel.testing.seeded import build, seeded
from dit_accel.testing.siglip import tiny_siglip

HISTORY = {
    "4x": 16,
    "2x": 2,
    "clean": 2,
}  # frames of each scale, the image's among the last, as the pipeline has it


def tiny_framepack_transformer(*, seed: int = 0, **config: Any) -> nn.Module:
    """A `HunyuanVideoFramepackTransformer3DModel` of one dual and one single block, two heads of 16.

    Args:
        seed: of its random weights; the global generator is left as it was.
        config: any of the class's arguments.
    """
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    own = {**TINY, "has_image_proj": True, "image_proj_dim": 20, "has_clean_x_embedder": True}
    return build(HunyuanVideoFramepackTransformer3DModel, seed, **{**own, **config})


def tiny_framepack_inputs(
    transformer: nn.Module,
    grid: tuple[int, int, int] = (3, 5, 7),
    *,
    text: int = 19,
    valid: int | tuple[int, ...] | None = None,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for one forward of such a transformer on a grid of so many tokens, with 20 frames of history.

    Args:
        text: text tokens; an image's 9 stand before them.
        valid: how many of the text's are no padding, for all batch rows or each; None: all.
    """
    inputs = tiny_hunyuan_video_inputs(transformer, grid, text=text, valid=valid, batch=batch, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1000)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels, _, *size = inputs["hidden_states"].shape[1:]
    frames = sum(HISTORY.values())
    indices = torch.arange(frames + grid[0]).split([*HISTORY.values(), grid[0]])
    for (scale, length), numbers in zip(HISTORY.items(), indices, strict=False):
        name = "latents_clean" if scale == "clean" else f"latents_history_{scale}"
        inputs |= {name: randn(batch, channels, length, *size), f"indices_{name}": numbers}
    inputs["indices_latents"] = indices[-1]
    inputs["image_embeds"] = randn(batch, 9, transformer.config.image_proj_dim)
    return inputs


def tiny_framepack_pipeline(*, seed: int = 0, transformer: dict[str, Any] | None = None) -> Any:
    """A `HunyuanVideoFramepackPipeline` without text encoders.

    Call it with `image`, `prompt_embeds`, `pooled_prompt_embeds` and `prompt_attention_mask`. Its autoencoder
    compresses 4x in time and 8x in space, as the model's does. It returns a list: the latents so far, after each
    section.

    Args:
        seed: of all weights.
        transformer: further arguments of `tiny_framepack_transformer`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoFramepackPipeline

    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    with seeded(seed):
        parts |= tiny_siglip(20, patches=3)
    parts["vae"] = tiny_hunyuan_video_vae(seed=seed)
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts["transformer"] = tiny_framepack_transformer(seed=seed + 1, **(transformer or {}))
    pipe = HunyuanVideoFramepackPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
