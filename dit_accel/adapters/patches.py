"""Latents by tokens, and tokens by latents, where a token is a patch of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dit_accel.layout import Grid


def split(latents: Tensor, grid: Grid, patch: Sequence[int]) -> Tensor | None:
    """Cut latents into the tokens' patches.

    Args:
        latents: `[B, C, F, H, W]`, or of images `[B, C, H, W]`.
        grid: frames, rows, columns, in tokens; the frames of images are not looked at.
        patch: edges of a token's patch, as many as the latents have axes.

    Returns:
        `[B, S, P, C]`: tokens in raster order, the places of each, and channels. None if these latents are of another
        size than the grid.
    """
    sizes = grid[-len(patch) :]
    if tuple(latents.shape[2:]) != tuple(n * p for n, p in zip(sizes, patch, strict=True)):
        return None
    cut = latents.reshape(*latents.shape[:2], *(size for pair in zip(sizes, patch, strict=True) for size in pair))
    tokens, places = range(2, cut.ndim, 2), range(3, cut.ndim, 2)
    cut = cut.permute(0, *tokens, *places, 1)
    return cut.reshape(len(latents), math.prod(sizes), math.prod(patch), latents.shape[1])


def spread(values: Tensor, grid: Grid, patch: Sequence[int]) -> Tensor:
    """Give every place of a patch its token's value: `[B, S]` becomes `[B, 1, F, H, W]`, or `[B, 1, H, W]`."""
    sizes = grid[-len(patch) :]
    spread = values.view(len(values), 1, *sizes)
    for axis, edge in enumerate(patch):
        spread = spread.repeat_interleave(edge, dim=2 + axis)
    return spread
