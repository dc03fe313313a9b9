"""TokenLayout: where the tokens of a video stand, and reversible orders that bring neighbours together.

A transformer sees a video as a flat run of tokens. Block-sparse attention keeps or drops whole runs of it, so
it matters which tokens share a block. `raster` leaves the model's order (frame, row, column) and cuts it
every `block` tokens. `tiles` cuts the grid into space-time boxes and makes each box one block; boxes that fit
the grid hold fewer tokens than a block may. `packed` gives every block but the last exactly `block` tokens, at the
price of borders with a step in them: GPU kernels compute whole blocks, so what tiles leave empty costs them up to
1.7 times the work (33x32x32 tokens: 343 tiles, or 264 packed blocks). `gilbert` walks the grid along a generalised
Hilbert curve and cuts the walk every `block` tokens.

Where a model tells the first frame's tokens by their place, every order keeps them first (`first_frame_apart`).

Text tokens of joint attention stand behind the video's or before them, as the model has them, in blocks of their own
and in the order they came in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_accel.arrangement import ORDERS, tile_parts
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
    text: int = 0  # text tokens, in blocks of their own
    text_first: bool = False  # whether they stand before the video's
    first_frame_apart: bool = False  # whether the first frame's tokens stay before all others of the video
    memo: dict[tuple, Tensor] = field(default_factory=dict, repr=False)  # what methods derive from it alone

    @property
    def n_video_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def n_tokens(self) -> int:
        return self.n_video_tokens + self.text

    @property
    def n_blocks(self) -> int:
        return self.sizes.shape[0]

    @property
    def n_text_blocks(self) -> int:
        return math.ceil(self.text / self.block)

    @property
    def n_video_blocks(self) -> int:
        return self.n_blocks - self.n_text_blocks

    @property
    def video_tokens(self) -> slice:
        """Where the video stands among the tokens."""
        first = self.text if self.text_first else 0
        return slice(first, first + self.n_video_tokens)

    @property
    def text_tokens(self) -> slice:
        """Where the text stands among the tokens; an empty run where there is none."""
        first = 0 if self.text_first else self.n_video_tokens
        return slice(first, first + self.text)

    @property
    def video_blocks(self) -> slice:
        """Which blocks hold video."""
        first = self.n_text_blocks if self.text_first else 0
        return slice(first, first + self.n_video_blocks)

    @property
    def text_blocks(self) -> slice:
        """Which blocks hold text; an empty run where there is none."""
        first = 0 if self.text_first else self.n_video_blocks
        return slice(first, first + self.n_text_blocks)

    def coordinates(self) -> Tensor:
        """Frame, row and column of each video token in turn, int64 `[n_video_tokens, 3]`."""
        raster = torch.arange(self.n_video_tokens, device=self.starts.device)
        order = raster if self.forward is None else self.forward
        return torch.stack(torch.unravel_index(order, self.grid), dim=-1)

    def bytes_held(self) -> int:
        held = (self.starts, self.sizes, self.near, self.first_frame, self.forward, self.backward)
        held += tuple(self.memo.values())
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """Bring the video's raster tokens along `dim` into this order."""
        return x if self.forward is None else x.index_select(dim, self.forward.to(x.device))

    def undo(self, x: Tensor, dim: int) -> Tensor:
        """Bring tokens along `dim` back into raster order; `undo(apply(x)) == x` exactly."""
        return x if self.backward is None else x.index_select(dim, self.backward.to(x.device))


def build_layout(
    grid: Grid,
    order: str,
    block: int,
    device: torch.device | str = "cpu",
    *,
    tile: Grid | None = None,
    text: int = 0,
    text_first: bool = False,
    first_frame_apart: bool = False,
) -> TokenLayout:
    """Lay out `grid` in the given order.

    Args:
        grid: frames, rows, columns, in tokens; any positive sizes, odd ones included.
        order: one of `ORDERS`.
        block: most tokens in one block.
        device: where the index tensors live.
        tile: with order "tiles", exact edges of a tile; None chooses edges that waste little.
        text: text tokens.
        text_first: whether they stand before the video's; else behind.
        first_frame_apart: whether the first frame's tokens stay before all others of the video, where models tell them
            by their place. Both parts are then ordered and cut by themselves; raster order has them so anyway.

    Raises:
        LayoutError: an empty grid or block, or a tile that is larger than a block or not for this order.
        UnknownNameError: an order that is not one of these.
    """
    if min(grid) < 1 or block < 1 or text < 0:
        raise LayoutError(
            f"A grid of {grid} tokens and {text} of text cannot be cut into blocks of {block}: all but the text "
            "must be at least 1."
        )
    if order not in ORDERS:
        raise unknown_name("token order", order, ORDERS)
    if tile is not None and (order != "tiles" or min(tile) < 1 or math.prod(tile) > block):
        raise LayoutError(
            f"tile={tuple(tile)} with order {order!r} and blocks of {block} tokens is not possible: a tile is for "
            "order 'tiles', and its three edges multiply to at most the block."
        )
    if first_frame_apart and order != "raster" and grid[0] > 1:
        frames, *frame = grid
        halves = (_order((n, *frame), order, block, tile) for n in (1, frames - 1))
        parts = _behind_one_another(*halves, grid, order, block)
    else:
        parts = _order(grid, order, block, tile)
    return _layout(grid, order, block, parts, (text, text_first), first_frame_apart, torch.device(device))


@dataclass(frozen=True, eq=False)
class _Parts:
    """Blocks of the video's tokens, on the CPU. Fields as in `TokenLayout`."""

    starts: Tensor
    near: Tensor
    first_frame: Tensor
    forward: Tensor | None


def _order(grid: Grid, order: str, block: int, tile: Grid | None) -> _Parts:
    match order:
        case "raster":
            return _raster(grid, block)
        case "tiles":
            return _tiles(grid, block, tile)
        case "packed":
            where = torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, 3)
            return _runs(grid, block, torch.cat(_halve(torch.arange(len(where)), where, block)))
    return _runs(grid, block, _gilbert(grid))


def _behind_one_another(first: _Parts, rest: _Parts, grid: Grid, order: str, block: int) -> _Parts:
    """The first frame's blocks, then those of the frames behind it."""
    assert first.forward is not None and rest.forward is not None
    starts = torch.cat([first.starts[:-1], first.starts[-1] + rest.starts])
    forward = torch.cat([first.forward, len(first.forward) + rest.forward])
    owner = torch.empty_like(forward)
    owner[forward] = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    near = _touching(owner.view(grid), 1 if order == "tiles" else _least_face(block))
    return _Parts(starts, near, torch.arange(len(starts) - 1) < len(first.near), forward)


def balanced_parts(length: int, parts: int) -> list[int]:
    """Sizes of `parts` runs that make up `length` and differ by at most one, longer ones first.

    17 in 5 parts is 4, 4, 3, 3, 3 rather than 4, 4, 4, 4, 1: a block mean over a sliver says little, and an
    executor spends a whole tile on it.
    """
    short, longer = divmod(length, parts)
    return [short + 1] * longer + [short] * (parts - longer)


def _raster(grid: Grid, block: int) -> _Parts:
    starts = _even_starts(math.prod(grid), block)
    index = torch.arange(len(starts) - 1)
    near = (index[:, None] - index).abs() == 1
    return _Parts(starts, near, starts[:-1] < grid[1] * grid[2], None)


def _tiles(grid: Grid, block: int, tile: Grid | None) -> _Parts:
    if tile is None:
        parts = tile_parts(grid, block)
        runs = [balanced_parts(length, count) for length, count in zip(grid, parts, strict=True)]
    else:
        runs = [
            [edge] * (length // edge) + [length % edge] * (length % edge > 0)
            for length, edge in zip(grid, tile, strict=True)
        ]
        parts = tuple(map(len, runs))
    # the part that each coordinate falls into, per axis
    part_of = [torch.repeat_interleave(torch.arange(len(run)), torch.tensor(run)) for run in runs]
    tile_of = (part_of[0][:, None, None] * parts[1] + part_of[1][:, None]) * parts[2] + part_of[
        2
    ]  # [F, H, W]
    forward = torch.argsort(tile_of.flatten(), stable=True)  # stable: raster order inside each tile
    sizes = torch.bincount(tile_of.flatten(), minlength=math.prod(parts))
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    first_frame = torch.arange(math.prod(parts)) < parts[1] * parts[2]
    return _Parts(starts, _touching(tile_of, 1), first_frame, forward)


def _runs(grid: Grid, block: int, forward: Tensor) -> _Parts:
    """Cut an order of the tokens every `block` of them."""
    starts = _even_starts(math.prod(grid), block)
    owner = torch.empty_like(forward)
    owner[forward] = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    owner = owner.view(grid)
    near = _touching(owner, _least_face(block))
    first_frame = torch.zeros(len(starts) - 1, dtype=torch.bool)
    first_frame[owner[0].flatten()] = True
    return _Parts(starts, near, first_frame, forward)


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


def _least_face(block: int) -> int:
    """Tokens of a face by which blocks with steps in their borders count as near.

    The steps make blocks touch that a box between them would part: an eighth of a cube's face is asked.
    """
    return max(1, round(block ** (2 / 3) / 8))


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


def _gilbert(grid: Grid) -> Tensor:
    """Raster indices along a generalised Hilbert curve, for any edges; int64 `[S]`.

    The walk begins at the grid's first corner and travels along its longest axis. Neighbours on it are neighbours in
    the grid, but for a diagonal step where edges are odd. Source: J. Cerveny's generalisation of the curve to boxes, as
    Rectified SpaAttn (arXiv:2511.19835) uses it.
    """
    strides = (grid[1] * grid[2], grid[2], 1)
    walk: list[int] = []
    longest, middle, shortest = sorted(range(3), key=lambda axis: -grid[axis])
    edges = [(grid[axis], strides[axis]) for axis in (longest, middle, shortest)]
    _walk_box(0, *edges, walk)
    return torch.tensor(walk)


Edge = tuple[int, int]  # tokens along an edge, and the step in raster order from one to the next


def _walk_box(at: int, along: Edge, up: Edge, deep: Edge, walk: list[int]) -> None:
    """Append the tokens of a box, beginning at the corner `at` and ending at the other end of the edge `along`."""
    (length, step), (height, rise), (depth, sink) = along, up, deep
    edges = [edge for edge in (along, up, deep) if edge[0] > 1]
    if len(edges) < 2:
        count, stride = edges[0] if edges else (1, 0)
        walk.extend(range(at, at + count * stride, stride) if stride else [at])
        return
    half = _half(length)
    if 2 * length > 3 * height and 2 * length > 3 * depth:  # long: one half behind the other
        _walk_box(at, (half, step), up, deep, walk)
        _walk_box(at + half * step, (length - half, step), up, deep, walk)
        return
    end = at + (length - 1) * step
    half_up, half_deep = _half(height), _half(depth)
    back = (length - half, -step)
    if 3 * height > 4 * depth:  # flat: up, over, and down again
        _walk_box(at, (half_up, rise), deep, (half, step), walk)
        _walk_box(at + half_up * rise, along, (height - half_up, rise), deep, walk)
        _walk_box(end + (half_up - 1) * rise, (half_up, -rise), deep, back, walk)
    elif 3 * depth > 4 * height:  # narrow: in, over, and out again
        _walk_box(at, (half_deep, sink), (half, step), up, walk)
        _walk_box(at + half_deep * sink, along, up, (depth - half_deep, sink), walk)
        _walk_box(end + (half_deep - 1) * sink, (half_deep, -sink), back, up, walk)
    else:  # near a cube: eight octants, two of them and two pairs joined
        far = at + (half_up - 1) * rise + (depth - 1) * sink
        _walk_box(at, (half_up, rise), (half_deep, sink), (half, step), walk)
        _walk_box(at + half_up * rise, deep, (half, step), (height - half_up, rise), walk)
        _walk_box(far, along, (half_up, -rise), (depth - half_deep, -sink), walk)
        _walk_box(
            end + half_up * rise + (depth - 1) * sink, (depth, -sink), back, (height - half_up, rise), walk
        )
        _walk_box(end + (half_up - 1) * rise, (half_up, -rise), (half_deep, sink), back, walk)


def _half(length: int) -> int:
    """About half of an edge, even where it can be: an odd one would end the walk at the wrong corner."""
    half = length // 2
    return half + (half % 2 and length > 2)


def _even_starts(tokens: int, block: int) -> Tensor:
    return torch.cat([torch.arange(0, tokens, block), torch.tensor([tokens])])


def _layout(
    grid: Grid,
    order: str,
    block: int,
    parts: _Parts,
    text: tuple[int, bool],
    first_frame_apart: bool,
    device: torch.device,
) -> TokenLayout:
    starts, near, first_frame, forward = parts.starts, parts.near, parts.first_frame, parts.forward
    if text[0]:
        one, other = starts, _even_starts(text[0], block)
        if text[1]:
            one, other = other, one
        starts = torch.cat([one[:-1], one[-1] + other])
        more = len(starts) - 1 - len(near)
        sides = (more, 0) if text[1] else (0, more)
        near = torch.nn.functional.pad(near, sides * 2)
        first_frame = torch.nn.functional.pad(first_frame, sides)
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
        text=text[0],
        text_first=text[1],
        first_frame_apart=first_frame_apart,
    )
