"""Force: blocks that are kept whatever their score. They count towards the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout


def forced_blocks(
    layout: TokenLayout, neighbours: int | None, first_frame: bool, anchor: bool = False
) -> Tensor | None:
    """Key blocks that every query block reads.

    Args:
        layout: whose blocks.
        neighbours: key blocks at most so many steps away, from block to block through the faces they share (in
            raster order along the sequence); 0 is the query's own block, None forces none.
        first_frame: also every block that holds tokens of the first frame, which image-to-video anchors on.
        anchor: also, for query blocks with tokens of the first frame, all such key blocks. An image has no first frame:
            where the grid has one frame alone, neither this nor `first_frame` forces anything. Nor does this where the
            frames are so few that every block reaches into the first: that would be dense attention unasked for.

    Returns:
        bool `[N, N]`, query block by key block, or None if nothing is forced. The layout remembers it: do not write
        into it. Text blocks are always read, and read everything: dropping text changes the prompt, not the speed.
    """
    if layout.grid[0] == 1:
        first_frame = anchor = False
    if neighbours is None and not first_frame and not anchor and not layout.text:
        return None
    key = ("forced", neighbours, first_frame, anchor)
    if key not in layout.memo:
        layout.memo[key] = _build(layout, neighbours, first_frame, anchor)
    return layout.memo[key]


def _build(layout: TokenLayout, neighbours: int | None, first_frame: bool, anchor: bool) -> Tensor:
    forced = torch.zeros_like(layout.near)
    if neighbours is not None:
        reached = torch.eye(layout.n_blocks, device=forced.device)
        step = layout.near.float() + reached
        for _ in range(neighbours):
            reached = (reached @ step).clamp(max=1)
        forced |= reached > 0
    if first_frame:
        forced |= layout.first_frame[None]
    if anchor and not layout.first_frame[layout.video_blocks].all():
        forced |= layout.first_frame[None] & layout.first_frame[:, None]
    if layout.text:
        forced[layout.text_blocks] = True
        forced[:, layout.text_blocks] = True
    return forced
