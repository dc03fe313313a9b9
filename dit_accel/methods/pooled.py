"""pooled: read the key blocks whose mean key agrees best with the query block's mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call


@dataclass(frozen=True)
class Method:
    """Logits between block means, and a budget: a number of blocks, or a share of the attention they predict.

    With both `keep` and `top_p` the larger of the two budgets holds, row by row.

    Source: the pooled score shared by SpargeAttn (arXiv:2502.18137), SLA and VSA, with blocks of unequal
    size.
    """

    rows_apart: ClassVar[bool] = True

    keep: float | None = None  # share of key blocks to read, forced ones included
    top_p: float | None = None  # read the fewest blocks that should hold this share of the attention
    neighbours: int | None = 0  # also read blocks so near; 0 is the own block, none forces nothing
    first_frame: bool = False  # also read every block of the first frame

    def __post_init__(self) -> None:
        if self.keep is None and self.top_p is None:
            raise UsageError(
                "Method 'pooled' needs a budget: give keep= (say 0.25), top_p= (say 0.9) or both."
            )
        if self.neighbours is not None and self.neighbours < 0:
            raise UsageError(
                f"neighbours={self.neighbours} is not possible: neighbours is 0 or more, or none."
            )

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """Predict which key blocks matter to each query block.

        Args:
            query: `[B, S, H, D]`, post-RoPE, in the layout's order; as is `key`.

        Returns:
            A plan of its own for every batch row and head.
        """
        from dit_accel.methods.parts.budget import choose_blocks
        from dit_accel.methods.parts.force import forced_blocks
        from dit_accel.methods.parts.plans import plan_of
        from dit_accel.methods.parts.score import (
            block_means,
            expected_attention,
            scores_of_means,
            text_scores,
        )

        query_means, key_means = block_means(query, layout), block_means(key, layout)
        scores = scores_of_means(query_means, key_means)
        shares = None
        if self.top_p is not None:
            shares = expected_attention(scores, layout, text_scores(query_means, key, layout))
        forced = forced_blocks(layout, self.neighbours, self.first_frame)
        chosen = choose_blocks(scores, forced, self.keep, self.top_p, shares, text_blocks=layout.n_text_blocks)
        return plan_of(*chosen, layout, key_means)
