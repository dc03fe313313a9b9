"""Z-Image and Z-Image Omni: text to image, image to image, inpainting, ControlNet.

Batch rows come as lists, `x` and `cap_feats`, and so does the output; both branches of guidance are rows of one batch.
Time runs upwards, from 0 at noise to 1. `plain` says all this in the words that other families use.

Every attention of the main layers is joint: image tokens row by row, filled up to a multiple of 32 with tokens that are
learnt and attended like any others, then the caption, filled up likewise. What fills up the image counts as text here.
Rows with shorter captions are padded at their end, and a mask keeps that padding out; it is left out, which is exact.
The refiners attend to image or caption alone and stay dense.

The rotary table is made by an object that is no module, where no hook reaches it: tokens keep the model's own order.
In Omni, captions and several images stand in turn, clean ones and one that is made; its forwards run dense, with a
reason. Step caches that keep whole steps see the image that is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import LayoutError
from dit_accel.layout import Grid, TokenLayout
from dit_accel.trajectory import Facts

TRAIN_TIMESTEPS = 1000  # the pipelines divide the scheduler's timesteps by it
MULTIPLE = 32  # image and caption are filled up to such a number of tokens
ROWS_APART = True  # the output is a list of batch rows

OrderHook = tuple[nn.Module, Callable[[Any, TokenLayout], Any]]


def self_attentions(transformer: nn.Module) -> list[tuple[str, int]]:
    """Module path and layer of the attention of every main layer."""
    return [(f"layers.{layer}.attention", layer) for layer in range(len(transformer.layers))]


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments and, besides, `hidden_states` `[B, C, F, H, W]` and `timestep` as other families have them.

    Of rows of different sizes, which no tensor holds, `hidden_states` is the first.
    """
    if not arguments.get("x") or arguments.get("t") is None:
        return arguments
    images = _made(arguments["x"])
    hidden = torch.stack(images) if _alike(images) else images[0][None]
    return {**arguments, "hidden_states": hidden, "timestep": arguments["t"]}


def read(transformer: nn.Module, arguments: dict[str, Any]) -> Facts:
    """Facts of one forward. Reading the time waits for the device.

    Raises:
        LayoutError: an image that does not hold whole patches.
    """
    images, captions = _made(arguments["x"]), arguments["cap_feats"]
    grid = _grid(arguments, images[0])
    condition = captions[0]
    if isinstance(condition, list):  # Omni: several captions in each row
        text, valid = 0, None
        condition = condition[0]
    else:
        filled = _filled(math.prod(grid)) - math.prod(grid)
        valid = tuple(filled + _filled(len(caption)) for caption in captions)
        text = max(valid)
        valid = None if len(set(valid)) == 1 else valid
    return Facts(
        timestep=(1 - float(arguments["t"].min())) * TRAIN_TIMESTEPS,
        grid=grid,
        shape=tuple(size for image in images for size in image.shape),
        condition=condition,
        text=text,
        text_valid=valid,
    )


def why_dense(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why no attention of this forward can be sparse, or None if some can."""
    if isinstance(arguments["x"][0], list):
        return "Omni's captions and images stand in turn"
    return None if _alike(arguments["x"]) else "images of several sizes in one batch"


def why_apart(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why a step cache can keep nothing of this forward, or None if it can."""
    return None if _alike(_made(arguments["x"])) else "images of several sizes in one batch"


def why_raster(transformer: nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why the tokens of this forward must stay in the model's own order."""
    return "no hook reaches Z-Image's rotary table"


def order_hooks(transformer: nn.Module) -> list[OrderHook]:
    """None: `why_raster` says why."""
    return []


def _made(rows: list[Any]) -> list[Tensor]:
    """The image of each row that is made, `[C, F, H, W]`; in Omni it stands behind those that are given."""
    return [row[-1] if isinstance(row, list) else row for row in rows]


def _alike(images: list[Tensor]) -> bool:
    return len({tuple(image.shape) for image in images}) == 1


def _grid(arguments: dict[str, Any], image: Tensor) -> Grid:
    """Frames, rows and columns of an image's tokens."""
    edge, depth = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    sizes = tuple(image.shape[1:])
    if len(sizes) != 3 or any(size < p or size % p for size, p in zip(sizes, (depth, edge, edge), strict=True)):
        raise LayoutError(
            f"Z-Image got an image of shape {tuple(image.shape)}; it must be [channels, frames, rows, columns] and "
            f"hold whole patches of {depth}x{edge}x{edge}."
        )
    return sizes[0] // depth, sizes[1] // edge, sizes[2] // edge


def _filled(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE
