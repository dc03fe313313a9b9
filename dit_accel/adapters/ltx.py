"""LTX-Video: text to video, image to video, and conditioning on images or videos at any frame.

Self-attention sees video tokens only (text comes in through cross-attention), so every token is a visual one. The flat
order is frame, row, column of the packed latents. Pipelines give the grid as three numbers or as `video_coords`, pixel
coordinates of each token; latents of conditions at later frames are whole frames before the video's and count as such.

Tokens are reordered once per forward: where the patch embedding makes them, where the rotary table is made and behind
the output projection. Timesteps may be one per token, so the time embedding is reordered then too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dit_accel.adapters.joint import order_tokens, restore_tokens
from dit_accel.errors import LayoutError
from dit_accel.layout import Grid, TokenLayout
from dit_accel.trajectory import Facts

# classes that pass the permutation test of tests/adapters
_REORDERED = ("LTXVideoTransformer3DModel",)

OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def self_attentions(transformer: nn.Module) -> list[tuple[str, int]]:
    """Module path and layer of every self-attention."""
    return [(f"transformer_blocks.{i}.attn1", i) for i in range(len(transformer.transformer_blocks))]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. Timesteps are in the scheduler's units, one per batch row or one per token.

    Reading the largest of them waits for the device once per forward, reading the grid from `video_coords` once more.

    Raises:
        LayoutError: neither a grid nor coordinates, or not those of its tokens.
    """
    hidden = arguments["hidden_states"]
    return Facts(
        timestep=float(arguments["timestep"].max()),
        grid=_grid(transformer, arguments),
        shape=tuple(hidden.shape),
        condition=arguments.get("encoder_hidden_states"),
    )


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order, or None if they need not."""
    if type(transformer).__name__ not in _REORDERED:
        return f"reordering is not proven for {type(transformer).__name__}"
    batch, tokens = arguments["hidden_states"].shape[:2]
    if batch % tokens == 0:  # one timestep per row could not be told from one per token
        return "as many batch rows as tokens"
    return None


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """Modules whose output carries tokens into the block loop or out of it, and how to reorder it."""
    return [
        (transformer.rope, _order_rotary),
        (transformer.proj_in, order_tokens),
        (transformer.time_embed, _order_modulation),
        (transformer.proj_out, restore_tokens),
    ]


def _grid(transformer: nn.Module, arguments: dict[str, Any]) -> Grid:
    tokens, coords = arguments["hidden_states"].shape[1], arguments.get("video_coords")
    if coords is not None:  # [B, 3, S]: frame, row, column. What else is said about the grid, the model does not read.
        rows, columns = (len(axis.unique()) for axis in coords[0, 1:].cpu())
        grid = (tokens // (rows * columns), rows, columns)
    else:
        grid = tuple(arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
    if math.prod(grid) != tokens:
        given = "video_coords of" if coords is not None else "num_frames, height and width of"
        raise LayoutError(
            f"{type(transformer).__name__} got {tokens} tokens, but {given} a grid of {grid}. Give num_frames, height "
            "and width in tokens, or video_coords of whole frames of one size."
        )
    return grid


def _order_rotary(output: tuple[Tensor, ...], layout: TokenLayout) -> tuple[Tensor, ...]:
    return tuple(layout.apply(table, 1) for table in output)  # each [B, S, C]


def _order_modulation(output: tuple[Tensor, ...], layout: TokenLayout) -> tuple[Tensor, ...]:
    tokens = layout.n_video_tokens
    if output[0].shape[0] % tokens:
        return output  # one row per batch row
    # [B S, C], one row per token
    return tuple(layout.apply(x.unflatten(0, (-1, tokens)), 1).flatten(0, 1) for x in output)
