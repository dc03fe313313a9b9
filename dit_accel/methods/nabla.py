"""nabla: read the fewest key blocks that hold most of the attention between block means, and a window around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UsageError
from dit_accel.methods.parts.axes import is_whole, per_axis

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call


@dataclass(frozen=True)
class Method:
    """Softmax over the logits of block means; per query block, the smallest set of key blocks that holds `top_p` of it.

    Blocks are squares of 8 x 8 tokens of one frame. Those at the far borders are smaller where 8 does not divide the
    grid: a mean is over the tokens there are, and a block's share counts each of them. (The published code crops the
    video instead, and takes softmax and running sum in the model's precision, of which bfloat16 leaves two or three
    digits for a sum over a thousand blocks; here all of it is fp32.) Text blocks are always read and take no part in
    the shares: `top_p` is of the video's.

    Rows whose means foretell a peak would read next to nothing, and lose what the means hide, at every step; hence
    `keep`, a floor that the published method does not have.

    `window` adds all tiles so near, after the choice by share: the window's own share does not count towards `top_p`.
    It is not moved inward at the edges of the grid, and needs order "tiles"; without a window any order will do.

    Source: NABLA, arXiv:2507.13546, with top_p .7, or .6 and window (11, 3, 3), or .5 and (11, 5, 5).
    """

    arrangement: ClassVar[Arrangement] = Arrangement("tiles", 64, (1, 8, 8))
    rows_apart: ClassVar[bool] = True

    top_p: float = 0.7  # share of the predicted attention that is read
    # read at least this share of the video's key blocks; .001 for the published rule, which has no floor
    keep: float | None = 0.1
    # also read this window: so many tiles in time, from top to bottom, across; an even number as the odd one above
    window: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            rule = "a whole number of tiles from 1"
            window = per_axis("window", self.window, lambda n: is_whole(n, 1), rule)
            object.__setattr__(self, "window", window)

    @property
    def needs_grid(self) -> bool:
        """A window counts tiles."""
        return self.window is not None

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """Predict which key blocks hold the attention of each query block.

        Args:
            query: `[B, S, H, D]`, post-RoPE, in the layout's order; as is `key`.

        Returns:
            A plan of its own for every batch row and head.

        Raises:
            UsageError: a window, and a layout that has no tiles.
        """
        import torch

        from dit_accel.kernels.selection import select_blocks
        from dit_accel.methods.parts.budget import choose_blocks
        from dit_accel.methods.parts.force import forced_blocks
        from dit_accel.methods.parts.plans import plan_of
        from dit_accel.methods.parts.score import block_means, mean_scores

        if self.window is not None and layout.order != "tiles":
            raise UsageError(
                f"window={self.window} of method 'nabla' counts tiles, and order {layout.order!r} has none. Leave "
                "`order` out, set it to 'tiles', or give no window."
            )
        key_means = block_means(key, layout)
        # A block's share is that of all its tokens: the fewest blocks are those of the largest shares.
        scores = mean_scores(query, key_means, layout) + layout.sizes.to(query.device).log()
        shares = torch.zeros_like(scores)
        shares[..., layout.video_blocks] = scores[..., layout.video_blocks].softmax(-1)
        forced = forced_blocks(layout, None, False)
        chosen = choose_blocks(
            scores,
            forced,
            self.keep,
            self.top_p,
            shares,
            text_blocks=layout.n_text_blocks,
        )
        plan = plan_of(*chosen, layout, key_means)
        if self.window is None:
            return plan
        # The union: what was chosen, listed anew with the window.
        wanted = self._window(layout).to(query.device)
        wanted = wanted if forced is None else wanted | forced.to(query.device)
        return plan_of(*select_blocks(plan.to_mask().float(), wanted, 1, above=1.0), layout, key_means)

    def _window(self, layout: TokenLayout) -> Tensor:
        """Pairs of video tiles within the window, bool `[N, N]`; the layout remembers it."""
        from dit_accel.methods.parts.windows import tile_places

        name = ("nabla", self.window)
        if name not in layout.memo:
            place = tile_places(layout)
            reach = place.new_tensor([edge // 2 for edge in self.window])
            near = layout.near.new_zeros(layout.n_blocks, layout.n_blocks)
            within = ((place[:, None] - place).abs() <= reach).all(-1)
            near[layout.video_blocks, layout.video_blocks] = within.to(near.device)
            layout.memo[name] = near
        return layout.memo[name]
