"""Wan 2.1 and 2.2: text to video, image to video, VACE, Animate, and the 5B model with per-token timesteps.

Self-attention sees video tokens only (text comes in through cross-attention), so every token is a visual one.
The flat order is frame, row, column of the patched latents.

Tokens are reordered once per forward: where the patch embedding makes them, where the rotary table is made
and behind the output projection. None of these modules is one that `compile_repeated_blocks` compiles. The 5B
model modulates per token, so its timesteps are reordered too (left alone, the result is off by about a half): as
arguments of the forward, before context parallelism splits them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dit_accel.adapters import patches
from dit_accel.adapters.block_modules import BlockModules
from dit_accel.errors import LayoutError
from dit_accel.layout import Grid, TokenLayout
from dit_accel.trajectory import Facts

TRAIN_TIMESTEPS = 1000  # Wan takes timesteps in the scheduler's units
# classes that pass the permutation test of tests/adapters
_REORDERED = ("WanTransformer3DModel", "WanVACETransformer3DModel")
# classes that pass tests/parallel; diffusers has no plan to split VACE and Animate
PARALLEL = ("WanTransformer3DModel",)
# classes that pass the region tests of tests/region
REGION = ("WanTransformer3DModel", "WanVACETransformer3DModel")
# for caches that leave out parts of a block; VACE's own blocks and Animate's face blocks are computed at every step
MODULES = {"WanTransformerBlock": BlockModules(attentions=("attn1",), rows=("attn2", "ffn"))}

OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def self_attentions(transformer: nn.Module) -> list[tuple[str, int]]:
    """Module path and layer of every self-attention, main blocks first, then VACE's."""
    paths = [f"blocks.{i}.attn1" for i in range(len(transformer.blocks))]
    paths += [f"vace_blocks.{i}.attn1" for i in range(len(getattr(transformer, "vace_blocks", ())))]
    return [(path, layer) for layer, path in enumerate(paths)]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward.

    The 5B model's timesteps are `[B, S]` with zeros on the tokens of a given first frame; the largest is the
    noise level of the rest. Reading it waits for the device once per forward.
    """
    latents, patch = arguments["hidden_states"], transformer.config.patch_size
    grid = tuple(size // p for size, p in zip(latents.shape[2:], patch, strict=True))
    if len(grid) != 3 or min(grid) < 1:
        raise LayoutError(
            f"{type(transformer).__name__} got latents of shape {tuple(latents.shape)}; with patches of "
            f"{tuple(patch)} they must be [batch, channels, frames, rows, columns] and hold at least one patch "
            "each way."
        )
    return Facts(
        timestep=float(arguments["timestep"].max()),
        grid=grid,
        shape=tuple(latents.shape),
        condition=arguments.get("encoder_hidden_states"),
    )


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order, or None if they need not."""
    if type(transformer).__name__ == "WanAnimateTransformer3DModel":
        return "Animate's face blocks attend frame by frame"
    if type(transformer).__name__ not in _REORDERED:
        return f"reordering is not proven for {type(transformer).__name__}"
    control = arguments.get("control_hidden_states")
    if control is not None and control.shape[2:] != arguments["hidden_states"].shape[2:]:
        return "VACE control of another size than the latents"  # it is padded in the model's order
    return None


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """Modules whose output carries tokens into the block loop or out of it, and how to reorder that
    output."""
    hooks: list[OrderHook] = [
        (transformer.rope, _order_rotary),
        (transformer.patch_embedding, _order_feature_map),
        (transformer.proj_out, _restore),
    ]
    if hasattr(transformer, "vace_patch_embedding"):
        hooks.append((transformer.vace_patch_embedding, _order_feature_map))
    return hooks


def patch_velocity(transformer: nn.Module, velocity: Tensor, grid: Grid) -> Tensor | None:
    """A velocity `[B, C, F, H, W]` by tokens, `[B, S, P, C]`; None if it is of another size than the tokens' grid."""
    return patches.split(velocity, grid, transformer.config.patch_size)


def spread_tokens(transformer: nn.Module, values: Tensor, grid: Grid) -> Tensor:
    """A value of each token, `[B, S]`, at each of its places in the latents: `[B, 1, F, H, W]`."""
    return patches.spread(values, grid, transformer.config.patch_size)


def order_arguments(arguments: dict[str, Any], layout: TokenLayout) -> dict[str, Tensor]:
    """Arguments of the forward that hold a value for each token, in the layout's order."""
    timestep = arguments["timestep"]
    return {"timestep": layout.apply(timestep, 1)} if timestep.ndim == 2 else {}  # [B, S]


def _order_rotary(output: tuple[Tensor, ...], layout: TokenLayout) -> tuple[Tensor, ...]:
    return tuple(layout.apply(table, 1) for table in output)  # each [1, S, 1, D]


def _order_feature_map(output: Tensor, layout: TokenLayout) -> Tensor:
    # [B, C, F, H, W] -> the model flattens the last three next, which makes this the order of its tokens
    tokens = layout.apply(output.flatten(2), 2)
    fits = tokens.shape[2] == math.prod(output.shape[2:])
    return tokens.view(output.shape) if fits else tokens[..., None, None]  # region sampling takes a part of them


def _restore(output: Tensor, layout: TokenLayout) -> Tensor:
    assert output.shape[1] == layout.n_video_tokens
    return layout.undo(output, 1)  # [B, S, patch]
