"""HunyuanVideo: text to video, and image to video that gives the image as channels or as its first frame's tokens.

Every attention of the blocks is joint: video tokens first, then text, of which the last ones may be padding that a mask
keeps out. Padding is trimmed, which is exact: nothing reads it, and what it would read reaches no output. The token
refiner's attentions are among text alone and stay stock.

Video tokens are reordered once per forward: where the patch embedding makes them, where the rotary table is made and
behind the output projection. With `token_replace` the first frame has a modulation of its own, told by its place: its
tokens stay before all others, in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.adapters.joint import joint_attentions, order_tokens, restore_tokens
from dit_accel.errors import LayoutError
from dit_accel.layout import TokenLayout
from dit_accel.trajectory import Facts

# classes that pass the permutation test of tests/adapters
_REORDERED = ("HunyuanVideoTransformer3DModel",)

self_attentions = joint_attentions
OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. Reading the lengths of the prompts waits for the device once per forward.

    Raises:
        LayoutError: latents without a single patch each way.
    """
    text = arguments["encoder_hidden_states"]
    return Facts(
        timestep=float(arguments["timestep"].max()),
        grid=read_grid(transformer, arguments["hidden_states"]),
        shape=tuple(arguments["hidden_states"].shape),
        condition=text,
        text=text.shape[1],
        # counted as the model counts: masks come in the model's dtype, and bf16 cannot hold 257
        text_valid=tuple(arguments["encoder_attention_mask"].sum(1, dtype=torch.int).tolist()),
        first_frame_apart=transformer.config.image_condition_type == "token_replace",
    )


def read_grid(transformer: nn.Module, latents: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of the tokens of latents `[B, C, F, H, W]`.

    Raises:
        LayoutError: latents without a single patch each way.
    """
    config = transformer.config
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    grid = tuple(size // p for size, p in zip(latents.shape[2:], patch, strict=False))
    if latents.ndim != 5 or min(grid) < 1:
        raise LayoutError(
            f"{type(transformer).__name__} got latents of shape {tuple(latents.shape)}; with patches of {patch} they "
            "must be [batch, channels, frames, rows, columns] and hold at least one patch each way."
        )
    return grid


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order, or None if they need not."""
    if type(transformer).__name__ not in _REORDERED:
        return f"reordering is not proven for {type(transformer).__name__}"
    return None


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """Modules whose output carries tokens into the block loop or out of it, and how to reorder it."""
    return [
        (transformer.x_embedder, order_tokens),
        (transformer.rope, _order_rotary),
        (transformer.proj_out, restore_tokens),
    ]


def _order_rotary(output: tuple[Tensor, ...], layout: TokenLayout) -> tuple[Tensor, ...]:
    return tuple(layout.apply(table, 0) for table in output)  # each [N, D]
