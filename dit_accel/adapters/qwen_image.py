"""Qwen-Image: text to image, image to image, ControlNet, Layered, and Edit with reference images.

Every attention is joint: text tokens stand before the image's. The flat order of the image is frame, row, column of the
packed latents, as `img_shapes` says, in which further images (Edit's references, Layered's layers) stand behind the
first. Images of one size are frames of one grid; the tokens of others are a line in the model's own order, and methods
that look at places run dense, with a reason. Padding of the text stands between it and the image; it is left out, which
is exact: nothing reads it, and what it would read reaches no output. A mask with holes runs dense, with a reason.

Image tokens are reordered once per forward: where the patch embedding makes them, where the rotary table is made and
behind the output projection. With `zero_cond_t` (Edit of 2511) reference tokens have a modulation of their own, told
apart by their place, so that such a forward keeps the model's own order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dit_accel.adapters.joint import grid_of_images, joint_attentions, order_tokens, restore_tokens
from dit_accel.errors import LayoutError
from dit_accel.layout import Grid, TokenLayout
from dit_accel.trajectory import Facts

TRAIN_TIMESTEPS = 1000  # the pipelines divide the scheduler's timesteps by it
# classes that pass the permutation test of tests/adapters
_REORDERED = ("QwenImageTransformer2DModel",)

self_attentions = joint_attentions
OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. Reading a mask of the text waits for the device.

    Raises:
        LayoutError: no `img_shapes`, or not those of its image tokens.
    """
    hidden, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    mask = arguments.get("encoder_hidden_states_mask")
    grid, loose = grid_of_images(_images(transformer, arguments))
    return Facts(
        timestep=float(arguments["timestep"].max()) * TRAIN_TIMESTEPS,
        grid=grid,
        shape=tuple(hidden.shape),
        condition=text,
        loose=loose,
        text=text.shape[1],
        text_first=True,
        text_valid=None if mask is None else tuple(int(n) for n in mask.bool().sum(1).tolist()),
    )


def why_dense(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why no attention of this forward can be sparse, or None if some can."""
    mask = arguments.get("encoder_hidden_states_mask")
    if mask is not None and (mask.bool().int().diff(dim=1) > 0).any():
        return "a mask that keeps out text before other text"
    return None


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order, or None if they need not."""
    if type(transformer).__name__ not in _REORDERED:
        return f"reordering is not proven for {type(transformer).__name__}"
    if transformer.config.zero_cond_t and len(_images(transformer, arguments)) > 1:
        return "reference tokens are modulated by their place"
    if arguments.get("controlnet_block_samples") is not None:
        return "a ControlNet adds its tokens in the model's order"
    return None


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """Modules whose output carries tokens into the block loop or out of it, and how to reorder it."""
    return [
        (transformer.img_in, order_tokens),
        (transformer.pos_embed, _order_rotary),
        (transformer.proj_out, restore_tokens),
    ]


def _images(transformer: nn.Module, arguments: dict[str, Any]) -> list[Grid]:
    """Frames, rows and columns of each image that the tokens make up, in the order of the tokens."""
    tokens, given = arguments["hidden_states"].shape[1], arguments.get("img_shapes")
    # As the model reads it: of a list of batch rows the first counts; a row may be one shape or a list of them.
    row = given[0] if isinstance(given, list) and given else given
    images = [tuple(shape) for shape in (row if isinstance(row, list) else [row]) if shape is not None]
    if sum(map(math.prod, images)) != tokens or any(len(image) != 3 for image in images):
        raise LayoutError(
            f"{type(transformer).__name__} got img_shapes={given} for {tokens} image tokens; give frames, rows and "
            "columns of each image of each batch row, in tokens, as [[(1, rows, columns), ...], ...]."
        )
    return images


def _order_rotary(output: tuple[Tensor, Tensor], layout: TokenLayout) -> tuple[Tensor, Tensor]:
    image, text = output  # [N, D / 2] and [L, D / 2], complex
    return layout.apply(image, 0), text
