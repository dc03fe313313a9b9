"""Whole blocks of tokens as what is chosen, so that a step of a part of the tokens can attend sparsely.

Sparse attention computes blocks of queries: of tokens chosen one by one each block would have some, and none could be
left out. Where whole blocks are chosen, the others' rows of a plan are left out with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.plan import BlockPlan


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of image or video in a layout. Those shorter than the longest are computed at every step."""

    owner: Tensor  # int64 [S], the block of each raster token; 0 is the first that holds image or video
    raster: Tensor  # int64 [S], the raster token at each position of the layout
    sizes: Tensor  # fp32 [N], tokens
    full: Tensor  # int64 [M], blocks of the longest size, ascending
    size: int  # of these

    @classmethod
    def of(cls, layout: TokenLayout) -> Blocks:
        """Waits for the device."""
        sizes = layout.sizes[layout.video_blocks]
        raster = torch.arange(layout.n_video_tokens, device=sizes.device)
        position = raster if layout.backward is None else layout.backward
        owner = torch.searchsorted(sizes.long().cumsum(0), position.contiguous(), right=True)
        size = int(sizes.max())
        full = (sizes == size).nonzero()[:, 0]
        return cls(owner, raster if layout.forward is None else layout.forward, sizes, full, size)

    @property
    def n_short(self) -> int:
        """Blocks that are computed at every step."""
        return len(self.sizes) - len(self.full)

    def count(self, share: float) -> int:
        """How many full blocks make about this share of all tokens, with the blocks that are always computed."""
        always = len(self.owner) - len(self.full) * self.size
        return min(len(self.full), max(1, round((share * len(self.owner) - always) / self.size)))

    def means(self, x: Tensor) -> Tensor:
        """The mean over each full block of one number for each token: `[B, M]` in fp32 of `[B, S]`."""
        sums = torch.zeros(len(x), len(self.sizes), device=x.device)
        sums.index_add_(1, self.owner, x.float())
        return sums[:, self.full] / self.size

    def computed(self, chosen: Tensor) -> Tensor:
        """All blocks that are computed, int64 `[B, A]` ascending, where of the full ones these are, `[B, C]`."""
        out = (self.sizes == self.size).expand(len(chosen), -1).clone()
        out.scatter_(1, self.full[chosen], False)
        return out.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.n_short + chosen.shape[1]]

    def tokens(self, computed: Tensor) -> Tensor:
        """Raster indices of the tokens of such blocks, int64 `[B, K]`, in the layout's order."""
        out = torch.ones(len(computed), len(self.sizes), dtype=torch.bool, device=computed.device)
        out = out.scatter_(1, computed, False)[:, self.owner[self.raster]]
        count = len(self.owner) - self.size * (len(self.sizes) - computed.shape[1])
        return self.raster[out.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]]


def take_query_blocks(plan: BlockPlan, blocks: Tensor, n_tokens: int) -> BlockPlan:
    """The plan of some of its query blocks, as if there were no others.

    Args:
        plan: without orders of its own; one q_starts for all.
        blocks: int64 `[B, A]`, ascending.
        n_tokens: that they hold, in every row.
    """
    batch = len(blocks)
    sizes = plan.q_starts[0, 0].diff()[blocks]
    starts = torch.nn.functional.pad(sizes.cumsum(1), (1, 0)).to(torch.int32)

    def rows(x: Tensor) -> Tensor:
        if batch == 1:
            return x.index_select(2, blocks[0])
        x = x.expand(batch, *x.shape[1:])
        place = blocks.view(batch, 1, -1, *(1 for _ in x.shape[3:]))
        return x.gather(2, place.expand(batch, x.shape[1], -1, *x.shape[3:]))

    return replace(
        plan,
        counts=rows(plan.counts),
        indices=rows(plan.indices),
        q_starts=starts[:, None],
        n_q_tokens=n_tokens,
        coarse=None if plan.coarse is None else rows(plan.coarse),
        rest=None if plan.rest is None else rows(plan.rest),
        skipped=None if plan.skipped is None else rows(plan.skipped),
    )
