"""Windows: which blocks a rule about places lets read which, without ever looking at pairs of tokens.

Methods that know nothing of the content (windows, discs, bands) keep a pair of blocks if any pair of their tokens is
kept. A block is taken apart into boxes: a tile is one box, a run of raster tokens a few, a block with steps in its
borders some more. A box is a product of three intervals, so a rule that asks something of each axis by itself holds for
some pair of tokens of two boxes exactly if it does on each axis for some pair of coordinates. That makes the answer
exact for every token order, and its cost that of pairs of boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.parts.plans import plan_of
from dit_accel.plan import BlockPlan

FAR = 2**29  # a distance that no limit reaches; three of them still fit an int32
_AT_ONCE = 2**20  # pairs looked at together: some tens of megabytes


@dataclass(frozen=True, eq=False)
class Boxes:
    """The video's blocks as boxes that do not overlap, on the CPU; ascending by block."""

    owner: Tensor  # int64 [n], the block a box belongs to
    first: Tensor  # int64 [n, 3], lowest frame, row and column
    last: Tensor  # int64 [n, 3], highest ones, inclusive


def block_boxes(layout: TokenLayout) -> Boxes:
    """Take the video's blocks apart into boxes, few but not always the fewest.

    Tokens are joined along columns, then rows, then frames: what differs on one axis alone and follows there becomes
    one box.
    """
    where = layout.coordinates().cpu()
    sizes = layout.sizes[layout.video_blocks].long().cpu()
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    first = last = where
    for axis in (2, 1, 0):
        place = owner  # one number for all that must be equal: the block, and the intervals of the other axes
        for other in {0, 1, 2} - {axis}:
            length = layout.grid[other]
            place = (place * length + first[:, other]) * length + last[:, other]
        by_place = torch.argsort(place * layout.grid[axis] + first[:, axis])
        place, owner, first, last = (x[by_place] for x in (place, owner, first, last))
        begins = torch.ones(len(place), dtype=torch.bool)
        begins[1:] = (place[1:] != place[:-1]) | (first[1:, axis] != last[:-1, axis] + 1)
        ends = begins.roll(-1)  # the first one always begins, so the last one ends
        owner, first, last = owner[begins], first[begins], last[ends]
    by_owner = torch.argsort(owner, stable=True)
    return Boxes(owner[by_owner], first[by_owner], last[by_owner])


def tile_edges(layout: TokenLayout) -> tuple[int, int, int]:
    """Edges of the largest tile, in tokens; one token where the blocks are not tiles. The layout remembers them."""
    if layout.order != "tiles":
        return (1, 1, 1)
    name = ("tile edges",)
    if name not in layout.memo:
        boxes = block_boxes(layout)
        layout.memo[name] = (boxes.last - boxes.first + 1).amax(0)  # on the CPU: reading it waits for nothing
    frames, rows, columns = layout.memo[name].tolist()
    return frames, rows, columns


def tile_places(layout: TokenLayout) -> Tensor:
    """Place of each tile among the tiles, int64 `[N, 3]`: which one it is in time, from the top and from the left."""
    first = block_boxes(layout).first
    return torch.stack([first[:, axis].unique(return_inverse=True)[1] for axis in range(3)], dim=-1)


def blocks_within(layout: TokenLayout, distances: Sequence[Tensor], limit: int) -> Tensor:
    """Pairs of video blocks that hold a pair of tokens nearer than the limit.

    The distance of two tokens is the sum of one distance per axis. Squares make it a disc or a ball; 0 and `FAR` make
    it a window.

    Args:
        distances: one table per axis, integers `[X, X]`: from each coordinate of a query token to each of a key token;
            0 or more, at most `FAR`.
        limit: the distance must be less.

    Returns:
        bool `[Nq, Nk]` over the video's blocks, on the CPU.
    """
    boxes = block_boxes(layout)
    axes = [
        _least_between(table.cpu(), boxes.first[:, axis], boxes.last[:, axis])
        for axis, table in enumerate(distances)
    ]

    def near(some: Tensor) -> Tensor:
        total = sum(least[interval[some]][:, interval] for least, interval in axes)
        return total < limit

    return pairs_with(near, boxes.owner, layout.n_video_blocks)


def pairs_with(holds: Callable[[Tensor], Tensor], owner: Tensor, n_blocks: int) -> Tensor:
    """Pairs of blocks for which something holds between a part of the one and a part of the other.

    Args:
        holds: given some parts `[m]` by number, says for each of them and each of all parts whether it does,
            bool `[m, n]`.
        owner: int64 `[n]`, the block each part belongs to.

    Returns:
        bool `[n_blocks, n_blocks]`.
    """
    kept = torch.zeros(n_blocks, n_blocks, dtype=torch.bool)
    for some in torch.arange(len(owner)).split(max(1, _AT_ONCE // len(owner))):
        query, key = holds(some).nonzero(as_tuple=True)
        kept[owner[some[query]], owner[key]] = True
    return kept


def plan_once(
    key: tuple, layout: TokenLayout, device: torch.device, build: Callable[[], Tensor]
) -> BlockPlan:
    """The plan of a method that looks only at the layout: made once, for all heads, rows, layers and steps.

    Text is read by every query block and reads everything.

    Args:
        key: what tells this plan from others of the layout, which remembers it: the method and its options.
        device: where the plan is to live.
        build: gives the pairs of video blocks, bool `[Nq, Nk]`.
    """
    names = [(*key, str(device), part) for part in ("counts", "indices")]
    if names[0] not in layout.memo:
        mask = torch.ones(layout.n_blocks, layout.n_blocks, dtype=torch.bool)
        mask[layout.video_blocks, layout.video_blocks] = build()
        starts = layout.starts.cpu()
        plan = BlockPlan.from_mask(mask[None, None], starts, starts)
        lists = plan.indices[..., : int(plan.counts.max())].contiguous()
        layout.memo.update(zip(names, (plan.counts.to(device), lists.to(device)), strict=True))
    return plan_of(*(layout.memo[name] for name in names), layout)


def _least_between(table: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest entries of a table between intervals, `[U, U]` for the U intervals there are, and whose each one is."""
    intervals, which = torch.unique(first * len(table) + last, return_inverse=True)
    ranges = [(int(n) // len(table), int(n) % len(table) + 1) for n in intervals]
    rows = torch.stack([table[a:b].amin(0) for a, b in ranges])
    return torch.stack([rows[:, a:b].amin(1) for a, b in ranges], dim=1), which
