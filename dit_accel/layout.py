"""TokenLayout: where the tokens of a video stand, and reversible orders that bring neighbours together.

A transformer sees a video as a flat run of tokens. Block-sparse attention keeps or drops whole runs of it, so
it matters which tokens share a block. `raster` leaves the model's order (frame, row, column) and cuts it
every `block` tokens. `tiles` cuts the grid into space-time boxes and makes each box one block; boxes that fit
the grid hold fewer tokens than a block may. `packed` gives every block but the last exactly `block` tokens, at the
price of borders with a step in them: GPU kernels compute whole blocks, so what tiles leave empty costs them up to
1.7 times the work (33x32x32 tokens: 343 tiles, or 264 packed blocks).
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
    near: Tensor  # bool [N, N], pairs of blocks one step apart: they share a face, or follow one another (raster)
    first_frame: Tensor  # bool [N], whether the block holds tokens of the first frame
    forward: Tensor | None  # int64 [S], raster index of the token at each position; None: raster itself
    backward: Tensor | None  # int64 [S], position of each raster token
    max_block: int  # tokens of the largest block
    even: bool  # every block but the last holds that many
    memo: dict[tuple, Tensor] = field(default_factory=dict, repr=False)  # what methods derive from it alone

    @property
    def n_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def n_blocks(self) -> int:
        return self.sizes.shape[0]

    @property
    def segments(self) -> tuple[tuple[str, int, int], ...]:
        """Kinds of tokens as (name, first, after the last)."""
        return (("video", 0, self.n_tokens),)

    def bytes_held(self) -> int:
        held = (self.starts, self.sizes, self.near, self.first_frame, self.forward, self.backward)
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
        order: "raster", "tiles" or "packed".
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
    if order == "packed":
        return _packed(grid, block, torch.device(device))
    raise unknown_name("token order", order, ("raster", "tiles", "packed"))


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
    starts = _even_starts(grid, block)
    index = torch.arange(len(starts) - 1)
    near = (index[:, None] - index).abs() == 1
    return _layout(grid, "raster", block, starts, near, starts[:-1] < grid[1] * grid[2], None, device)


def _tiles(grid: Grid, block: int, device: torch.device) -> TokenLayout:
    parts = tile_parts(grid, block)
    runs = [balanced_parts(length, count) for length, count in zip(grid, parts, strict=True)]
    # the part that each coordinate falls into, per axis
    part_of = [torch.repeat_interleave(torch.arange(len(run)), torch.tensor(run)) for run in runs]
    tile = (part_of[0][:, None, None] * parts[1] + part_of[1][:, None]) * parts[2] + part_of[2]  # [F, H, W]
    forward = torch.argsort(tile.flatten(), stable=True)  # stable: raster order inside each tile
    sizes = torch.bincount(tile.flatten(), minlength=math.prod(parts))
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    first_frame = torch.arange(math.prod(parts)) < parts[1] * parts[2]
    return _layout(grid, "tiles", block, starts, _touching(tile, 1), first_frame, forward, device)


def _packed(grid: Grid, block: int, device: torch.device) -> TokenLayout:
    starts = _even_starts(grid, block)
    where = torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, 3)
    forward = torch.cat(_halve(torch.arange(len(where)), where, block))
    owner = torch.empty_like(forward)
    owner[forward] = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    owner = owner.view(grid)
    # Steps in the borders make blocks touch that a box between them would part: an eighth of a cube's face is asked.
    near = _touching(owner, max(1, round(block ** (2 / 3) / 8)))
    first_frame = torch.zeros(len(starts) - 1, dtype=torch.bool)
    first_frame[owner[0].flatten()] = True
    return _layout(grid, "packed", block, starts, near, first_frame, forward, device)


def _halve(tokens: Tensor, where: Tensor, block: int) -> list[Tensor]:
    """Cut a region into blocks by halving it across its longest edge, again and again (a k-d tree).

    Both halves are whole numbers of blocks, as far as there are enough tokens. Among the cuts near the middle the one
    that leaves the smallest step in the cutting plane is taken.

    Args:
        tokens: raster indices, `[n]`.
        where: coordinates of all raster tokens, `[S, 3]`.
    """
    blocks = math.ceil(len(tokens) / block)
    if blocks == 1:
        return [tokens.sort().values]
    found = where[tokens]
    edges = (found.amax(0) - found.amin(0) + 1).tolist()
    axes = sorted(range(3), key=lambda axis: -edges[axis])
    rank = found[:, axes[0]]
    for axis in axes[1:]:
        rank = rank * int(where[-1, axis] + 1) + found[:, axis]
    tokens = tokens[rank.argsort()]
    plane = len(tokens) / edges[axes[0]]
    middle = range(max(1, math.floor(0.4 * blocks)), min(blocks - 1, math.ceil(0.6 * blocks)) + 1)
    cut = min(middle, key=lambda n: (min(n * block % plane, -n * block % plane), abs(n - blocks / 2)))
    return [*_halve(tokens[: cut * block], where, block), *_halve(tokens[cut * block :], where, block)]


def _touching(owner: Tensor, least: int) -> Tensor:
    """Which blocks share at least `least` faces of tokens, bool `[N, N]`. owner: each token's block, `[F, H, W]`."""
    count = int(owner.max()) + 1
    faces = torch.zeros(count * count, dtype=torch.int64)
    for axis, length in enumerate(owner.shape):
        one, other = owner.narrow(axis, 0, length - 1), owner.narrow(axis, 1, length - 1)
        faces += torch.bincount((one * count + other).flatten(), minlength=count * count)
    faces = faces.view(count, count)
    near = faces + faces.T >= least
    return near.fill_diagonal_(False)


def _even_starts(grid: Grid, block: int) -> Tensor:
    tokens = math.prod(grid)
    return torch.cat([torch.arange(0, tokens, block), torch.tensor([tokens])])


def _layout(
    grid: Grid,
    order: str,
    block: int,
    starts: Tensor,
    near: Tensor,
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
        near=near.to(device),
        first_frame=first_frame.to(device),
        forward=None if forward is None else forward.to(device),
        backward=None if backward is None else backward.to(device),
        max_block=int(sizes.max()),
        even=bool((sizes[:-1] == sizes.max()).all()),
    )
