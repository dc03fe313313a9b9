"""Arrangement: which tokens share a block. What a method was made for, or what was asked of it; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

ORDERS = ("raster", "tiles", "packed", "gilbert")  # what they are: dit_accel.layout


@dataclass(frozen=True)
class Arrangement:
    """An order of the tokens, and how it is cut."""

    order: str = "tiles"  # one of `ORDERS`
    block: int = 128  # most tokens in one block, 8 to 128
    # with order "tiles": frames, rows, columns of a tile, in tokens; those at the far borders are smaller
    tile: tuple[int, int, int] | None = None
