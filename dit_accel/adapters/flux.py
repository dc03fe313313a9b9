"""FLUX.1: text to image, also Fill, Control and image to image, which send the same tokens through it.

Every attention is joint: text tokens stand before the image's, in dual blocks and in single ones. The flat order of the
image is row, column of the packed latents, which `img_ids` tell. Kontext's reference tokens stand behind the image's;
of the same size they are a second frame. Where the tokens are no one grid they are a line in the model's own order:
blocks are then runs of rows, and methods that look at places run dense, with a reason.

Image tokens are reordered once per forward: where the patch embedding makes them, where the rotary table is made and
behind the output projection. The text keeps its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.adapters.block_modules import BlockModules
from dit_accel.adapters.joint import joint_attentions, order_tokens, read_images, restore_tokens
from dit_accel.errors import LayoutError
from dit_accel.layout import Grid, TokenLayout
from dit_accel.trajectory import Facts

TRAIN_TIMESTEPS = 1000  # the pipelines divide the scheduler's timesteps by it
# classes that pass the permutation test of tests/adapters
_REORDERED = ("FluxTransformer2DModel",)
# classes that pass the region tests of tests/region
REGION = ("FluxTransformer2DModel",)
# for caches that leave out parts of a block
MODULES = {
    "FluxTransformerBlock": BlockModules(attentions=("attn",), rows=("ff",), with_text=("attn",)),
    "FluxSingleTransformerBlock": BlockModules(
        attentions=("attn",), rows=("proj_out",), feeds=("proj_mlp",), with_text=("attn", "proj_out")
    ),
}

self_attentions = joint_attentions
OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. Reading the grid from `img_ids` waits for the device once per forward.

    Raises:
        LayoutError: no `img_ids`, or not three numbers for each token.
    """
    hidden, ids = arguments["hidden_states"], arguments.get("img_ids")
    if ids is None or ids.shape[-1] != 3 or ids.shape[-2] != hidden.shape[1]:
        raise LayoutError(
            f"{type(transformer).__name__} got img_ids of shape {None if ids is None else tuple(ids.shape)}; they must "
            f"be [{hidden.shape[1]}, 3], a row and a column for each of its image tokens."
        )
    ids = ids.reshape(-1, hidden.shape[1], 3)[0]
    grid, loose = read_images(ids)
    text = arguments["encoder_hidden_states"]
    return Facts(
        timestep=float(arguments["timestep"].max()) * TRAIN_TIMESTEPS,
        grid=grid,
        shape=tuple(hidden.shape),
        condition=text,
        loose=loose,
        text=text.shape[1],
        text_first=True,
    )


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order, or None if they need not."""
    if type(transformer).__name__ not in _REORDERED:
        return f"reordering is not proven for {type(transformer).__name__}"
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        if arguments.get(name) is not None:
            return "a ControlNet adds its tokens in the model's order"
    return None


def why_whole(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why this forward must compute every token, or None if region sampling may leave some out."""
    if len(arguments["hidden_states"]) > 1:
        return "a batch has one rotary table for all its rows, which would have to share their tokens"
    return None


def patch_velocity(transformer: nn.Module, velocity: Tensor, grid: Grid) -> Tensor | None:
    """A velocity `[B, S, C 4]` of packed 2 x 2 patches by tokens, `[B, S, P, C]`; None if it is of other tokens.

    Kontext's is of the image alone, without its reference.
    """
    if velocity.shape[1] != math.prod(grid):
        return None
    return velocity.unflatten(2, (-1, 4)).transpose(2, 3)


def spread_tokens(transformer: nn.Module, values: Tensor, grid: Grid) -> Tensor:
    """A value of each token, `[B, S]`, at its place among the packed latents: `[B, S, 1]`."""
    return values[..., None]


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """Modules whose output carries tokens into the block loop or out of it, and how to reorder it."""
    return [
        (transformer.x_embedder, order_tokens),
        (transformer.pos_embed, _order_rotary),
        (transformer.proj_out, restore_tokens),
    ]


def _order_rotary(output: tuple[Tensor, ...], layout: TokenLayout) -> tuple[Tensor, ...]:
    text = output[0].shape[0] - math.prod(layout.grid)  # each [L + N, D], the text's rows first
    return tuple(torch.cat([table[:text], layout.apply(table[None, text:], 1)[0]]) for table in output)
