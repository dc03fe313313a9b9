"""radial: bands around the same place in every frame, narrower the farther the frames are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call


@dataclass(frozen=True)
class Method:
    """Radial attention: a fixed plan in raster order whose bands halve each time the frame distance doubles.

    With n tokens in a frame, place p = 0 .. n - 1 in it, and two frames d apart with g the number of binary digits of
    d, a token reads

    - the frames d <= 1 whole, and with `first_frame` the first frame;
    - else |p - p'| <= max(decay_factor * w, block), with w = 2^digits(n) / 2^g. This base, the power of two above n, is
      the published code's, so that published factors mean the same; the paper has 2 n, the same where n is one;
    - and where w is less than a block, only frames with d a multiple of floor(block / w).

    A block often ends one frame and begins the next, so it is cut there. A block is read if, in some pair of frames,
    more than `vote` of the pairs of tokens of the two blocks' parts lie in the band. Since a band is never narrower
    than a block, a token always reads its own place in every frame that is not left out, and (1 - sqrt(2 vote)) of a
    block to both sides of it (0.18 by default), whatever n is. The published code counts against whole blocks: a part
    of less than a third of a block never wins, so that the first or last tokens of a frame lose what the band should
    give them wherever n is not a multiple of the block, and a short last block reads next to nothing. It also looks at
    no more than ceil(n / block) blocks of a frame, which leaves out the last one of some frames.

    Only for raster order: a part must be a run of places. The default reads .34 of 21 frames of 30 x 52 tokens (Wan at
    480p), .26 of 45 x 80 (720p).

    Source: Radial Attention, arXiv:2506.19852; decay factors as in its code: 0.2 for Wan 2.1 14B, 0.8 (blocks of 64)
    for Wan 2.2, 0.95 without the first frame for HunyuanVideo, all with the first 11 or 12 steps dense.
    """

    arrangement: ClassVar[Arrangement] = Arrangement("raster", 128)
    needs_grid: ClassVar[bool] = True
    rows_apart: ClassVar[bool] = True

    decay_factor: float = 0.2  # scales the bands' width
    first_frame: bool = True  # also read every block of the first frame
    vote: float = 1 / 3  # read a block if more than this share of a part is in the band; 0: if any of it

    def __post_init__(self) -> None:
        for name, least, most in (("decay_factor", 0, 100), ("vote", 0, 0.5)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not least <= value <= most:
                raise UsageError(
                    f"{name}={value!r} is not possible: {name} is a number from {least} to {most}."
                )
        if not isinstance(self.first_frame, bool):
            raise UsageError(
                f"first_frame={self.first_frame!r} is not possible: first_frame is true or false."
            )

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """The bands' plan, one for all heads and batch rows.

        Args:
            query: `[B, S, H, D]`; only its device is looked at.

        Raises:
            UsageError: the layout is not in raster order.
        """
        from dit_accel.methods.parts.windows import plan_once

        if layout.order != "raster":
            raise UsageError(
                f"Method 'radial' cannot work in order {layout.order!r}: its bands are runs of raster order. "
                "Leave `order` out, or set it to 'raster'."
            )
        facts = ("radial", self.decay_factor, self.first_frame, self.vote)
        return plan_once(facts, layout, query.device, lambda: self._blocks(layout))

    def _blocks(self, layout: TokenLayout) -> Tensor:
        """Pairs of video blocks that are read, bool `[Nq, Nk]`."""
        import torch

        from dit_accel.methods.parts.windows import pairs_with

        frames, per_frame = layout.grid[0], layout.grid[1] * layout.grid[2]
        blocks, text = layout.video_blocks, layout.video_tokens.start
        starts = layout.starts.view(-1)[blocks.start : blocks.stop + 1].long().cpu() - text
        cuts = torch.cat([starts, torch.arange(frames) * per_frame]).unique()
        first, after = cuts[:-1], cuts[1:]
        frame = first // per_frame
        first, after = first - frame * per_frame, after - frame * per_frame  # places in the frame
        width = torch.tensor(
            [band_width(d, per_frame, layout.block, self.decay_factor) for d in range(frames)]
        )

        def holds(some: Tensor) -> Tensor:
            here = width[(frame[some, None] - frame).abs()]
            in_band = _pairs_in_band(first[some, None], after[some, None], first, after, here)
            pairs = (after - first)[some, None] * (after - first)
            wins = in_band.double() > self.vote * pairs.double()
            return wins | (frame == 0) if self.first_frame else wins

        owner = torch.searchsorted(starts, cuts[:-1], right=True) - 1
        return pairs_with(holds, owner, layout.n_video_blocks)


def band_width(apart: int, per_frame: int, block: int, decay_factor: float) -> int:
    """Farthest place that is still read in a frame `apart` frames away; -1: the frame is left out.

    Args:
        per_frame: tokens in a frame.
        block: tokens in a block.
    """
    if apart <= 1:
        return per_frame
    digits, group = per_frame.bit_length(), apart.bit_length()
    every = (block << group) >> digits  # floor(block / w); 0 or 1: every frame
    if every > 1 and apart % every:
        return -1
    return int(max(decay_factor * 2.0 ** (digits - group), block))


def _pairs_in_band(
    first: Tensor, after: Tensor, key_first: Tensor, key_after: Tensor, width: Tensor
) -> Tensor:
    """How many pairs of a place in [first, after) and one in [key_first, key_after) are at most `width` apart."""

    def ahead_at_most(most: Tensor) -> Tensor:
        """Pairs whose key is at most so many places ahead of the query (or behind it at all)."""

        def corner(query_after: Tensor, key_from: Tensor) -> Tensor:
            # Queries before `query_after` and keys from `key_from` on, both without end: a triangle of pairs.
            edge = (most - key_from + query_after).clamp(min=0)
            return edge * (edge + 1) // 2

        return (
            corner(after, key_first)
            - corner(first, key_first)
            - corner(after, key_after)
            + corner(first, key_after)
        )

    return (ahead_at_most(width) - ahead_at_most(-width - 1)).clamp(min=0)
