"""TokenLayout: where the tokens of a video stand, and reversible orders that bring neighbours together.

A transformer sees a video as a flat run of tokens. Block-sparse attention keeps or drops whole runs of it, so
it matters which tokens share a block. `raster` leaves the model's order (frame, row, column) and cuts it
every `block` tokens. `tiles` cuts the grid into space-time boxes and makes each box one block.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_accel.errors import LayoutError, unknown_name

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """A grid of tokens, their order, and the blocks of that order. Build it with `build_layout`."""

    grid: Grid  # frames, rows, columns, in tokens
    order: str
    block: int  # most tokens in one block
    starts: Tensor  # int32 [1, 1, N + 1], first token of each block in this order, then the number of tokens
    sizes: Tensor  # fp32 [N], tokens of each block
    places: Tensor  # int64 [N, A], the block's place among the blocks: (tile frame, row, column), or (index,)
    first_frame: Tensor  # bool [N], whether the block holds tokens of the first frame
    forward: Tensor | None  # int64 [S], raster index of the token at each position; None: raster itself
    backward: Tensor | None  # int64 [S], position of each raster token
    max_block: int  # tokens of the largest block
    memo: dict[tuple, Tensor] = field(default_factory=dict, repr=False)  # what methods derive from it alone

    @property
    def n_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def n_blocks(self) -> int:
        return self.places.shape[0]

    @property
    def segments(self) -> tuple[tuple[str, int, int], ...]:
        """Kinds of tokens as (name, first, after the last)."""
        return (("video", 0, self.n_tokens),)

    def bytes_held(self) -> int:
        held = (self.starts, self.sizes, self.places, self.first_frame, self.forward, self.backward)
        held += tuple(self.memo.values())
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """Bring raster tokens along `dim` into this order."""
        return x if self.forward is None else x.index_select(dim, self.forward.to(x.device))

    def undo(self, x: Tensor, dim: int) -> Tensor:
        """Bring tokens along `dim` back into raster order; `undo(apply(x)) == x` exactly."""
        return x if self.backward is None else x.index_select(dim, self.backward.to(x.device))


def build_layout(grid: Grid, order: str, block: int, device: torch.device | str = "cpu") -> TokenLayout:
    """Lay out `grid` in the given order.

    Args:
        grid: frames, rows, columns, in tokens; any positive sizes, odd ones included.
        order: "raster" or "tiles".
        block: most tokens in one block.
        device: where the index tensors live.

    Raises:
        LayoutError: an empty grid or block.
        UnknownNameError: an order that is not one of these.
    """
    if min(grid) < 1 or block < 1:
        raise LayoutError(
            f"A grid of {grid} tokens cannot be cut into blocks of {block}: all must be at least 1."
        )
    if order == "raster":
        return _raster(grid, block, torch.device(device))
    if order == "tiles":
        return _tiles(grid, block, torch.device(device))
    raise unknown_name("token order", order, ("raster", "tiles"))


def balanced_parts(length: int, parts: int) -> list[int]:
    """Sizes of `parts` runs that make up `length` and differ by at most one, longer ones first.

    17 in 5 parts is 4, 4, 3, 3, 3 rather than 4, 4, 4, 4, 1: a block mean over a sliver says little, and an
    executor spends a whole tile on it.
    """
    short, longer = divmod(length, parts)
    return [short + 1] * longer + [short] * (parts - longer)


@functools.lru_cache(maxsize=64)
def tile_parts(grid: Grid, block: int) -> Grid:
    """Into how many parts to cut each axis so that no tile holds more than `block` tokens.

    Few tiles are good (each costs an executor a whole block), and so are tiles near a cube (a mean over a box
    of neighbours stands for them better than one over a long run). The product of the number of tiles and the
    fourth root of the mean tile's longest edge over its shortest is minimised: twice as oblong is worth 19 %
    more tiles. Ties go to fewer parts in time, then in rows.
    """
    frames, rows, columns = grid
    best: tuple[float, Grid] | None = None
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


def _raster(grid: Grid, block: int, device: torch.device) -> TokenLayout:
    tokens, frame = math.prod(grid), grid[1] * grid[2]
    n_blocks = math.ceil(tokens / block)
    starts = torch.arange(n_blocks + 1) * block
    starts[-1] = tokens
    return _layout(
        grid, "raster", block, starts, torch.arange(n_blocks)[:, None], starts[:-1] < frame, None, device
    )


def _tiles(grid: Grid, block: int, device: torch.device) -> TokenLayout:
    parts = tile_parts(grid, block)
    runs = [balanced_parts(length, count) for length, count in zip(grid, parts, strict=True)]
    # the part that each coordinate falls into, per axis
    part_of = [torch.repeat_interleave(torch.arange(len(run)), torch.tensor(run)) for run in runs]
    tile = (part_of[0][:, None, None] * parts[1] + part_of[1][:, None]) * parts[2] + part_of[2]  # [F, H, W]
    tile = tile.flatten()
    forward = torch.argsort(tile, stable=True)  # stable: raster order inside each tile
    sizes = torch.bincount(tile, minlength=math.prod(parts))
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    places = torch.cartesian_prod(*(torch.arange(count) for count in parts)).view(-1, 3)
    return _layout(grid, "tiles", block, starts, places, places[:, 0] == 0, forward, device)


def _layout(
    grid: Grid,
    order: str,
    block: int,
    starts: Tensor,
    places: Tensor,
    first_frame: Tensor,
    forward: Tensor | None,
    device: torch.device,
) -> TokenLayout:
    sizes = starts.diff()
    backward = None
    if forward is not None:
        backward = torch.empty_like(forward)
        backward[forward] = torch.arange(forward.numel())
    return TokenLayout(
        grid=grid,
        order=order,
        block=block,
        starts=starts.to(torch.int32).view(1, 1, -1).to(device),
        sizes=sizes.to(torch.float32).to(device),
        places=places.to(device),
        first_frame=first_frame.to(device),
        forward=None if forward is None else forward.to(device),
        backward=None if backward is None else backward.to(device),
        max_block=int(sizes.max()),
    )
