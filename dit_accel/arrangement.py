"""Arrangement: which tokens share a block. What a method was made for, or what was asked of it; imports no torch."""

from __future__ import annotations

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
