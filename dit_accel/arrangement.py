"""Arrangement: which tokens share a block. What a method was made for, or what was asked of it; imports no torch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from dit_accel.methods import Method
    from dit_accel.options import SparseOptions

ORDERS = ("raster", "tiles", "packed", "gilbert")  # what they are: dit_accel.layout


@dataclass(frozen=True)
class Arrangement:
    """An order of the tokens, and how it is cut."""

    order: str = "tiles"  # one of `ORDERS`
    block: int = 128  # most tokens in one block, 8 to 128
    # with order "tiles": frames, rows, columns of a tile, in tokens; those at the far borders are smaller
    tile: tuple[int, int, int] | None = None


def arrange(method: Method | None, options: SparseOptions) -> Arrangement:
    """What a method was made for, as far as nothing else was asked for.

    Raises:
        UsageError: a tile with another order than tiles, or larger than a block.
    """
    made_for = getattr(method, "arrangement", Arrangement())
    order, block = options.order or made_for.order, options.block or made_for.block
    tile = options.tile
    if tile is None and order == made_for.order and block == made_for.block:
        tile = made_for.tile
    if tile is not None and (order != "tiles" or math.prod(tile) > block):
        raise UsageError(
            f"tile={tile} with order {order!r} and block={block} is not possible: a tile is for order 'tiles', and its "
            "edges multiply to at most the block."
        )
    return Arrangement(order, block, tile)


@functools.lru_cache(maxsize=64)
def tile_parts(grid: tuple[int, int, int], block: int) -> tuple[int, int, int]:
    """Into how many parts to cut each axis so that no tile holds more than `block` tokens.

    Few tiles are good (each costs an executor a whole block), and so are tiles near a cube (a mean over a box
    of neighbours stands for them better than one over a long run). The product of the number of tiles and the
    fourth root of the mean tile's longest edge over its shortest is minimised: twice as oblong is worth 19 %
    more tiles. Ties go to fewer parts in time, then in rows.
    """
    frames, rows, columns = grid
    best: tuple[float, tuple[int, int, int]] | None = None
    for in_time in range(1, frames + 1):
        deep = math.ceil(frames / in_time)
        if deep > block:
            continue
        for in_rows in range(1, rows + 1):
            area = deep * math.ceil(rows / in_rows)
            if area > block:
                continue
            in_columns = math.ceil(columns / (block // area))
            edges = [n / p for n, p in zip(grid, (in_time, in_rows, in_columns), strict=True)]
            cost = in_time * in_rows * in_columns * (max(edges) / min(edges)) ** 0.25
            if best is None or cost < best[0] - 1e-9:
                best = (cost, (in_time, in_rows, in_columns))
    assert best is not None  # cutting every axis into single tokens always fits
    return best[1]


def blocks_for(keep: float, n_blocks: int) -> int:
    """Key blocks that a share stands for: rounded up, at least one."""
    return max(1, math.ceil(keep * n_blocks - 1e-9))  # 0.1 * 30 is 3.0000000000000004
