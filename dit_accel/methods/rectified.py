"""rectified: read what block means say matters, and give back the rest as mean values where that helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call

COMPENSATIONS = ("gain", "all", "none")
MASSES = ("measured", "predicted")


@dataclass(frozen=True)
class Method:
    """Shares of attention between block means, text keys one by one; the larger of two budgets; then rectified.

    The output is `R O_s + sum_j P_j mean(v_j)` over blocks j that are not read and worth pooling, with R the mass of
    all others: weights sum to one, and the mass of blocks whose mean would mislead stays with what was read.

    Source: Rectified SpaAttn, arXiv:2511.19835: Gilbert order, isolated pooling and its reallocation, GAPR. The
    published code adds forced blocks to the budget; here they count towards it, as everywhere. It takes zeros that pad
    the last block into its mean; here a mean is over the tokens there are.
    """

    arrangement: ClassVar[Arrangement] = Arrangement("gilbert", 128)
    rows_apart: ClassVar[bool] = True

    keep: float | None = None  # share of key blocks to read, forced ones included
    top_p: float | None = 0.3  # read the fewest blocks that should hold this share; the larger budget holds
    neighbours: int | None = 1  # also read blocks so near; 0 is the own block, none forces nothing
    first_frame: bool = False  # also read every block of the first frame
    anchor: bool = True  # blocks of the first frame read all such blocks
    compensation: str = "gain"  # "gain": blocks worth pooling (GAPR); "all": every block that is not read; "none"
    # how means weigh against what is read: "measured", by each row's own scores and what reading finds; or
    # "predicted" for whole blocks, as published
    mass: str = "measured"

    def __post_init__(self) -> None:
        if self.keep is None and self.top_p is None:
            raise UsageError(
                "Method 'rectified' needs a budget: give keep= (say 0.25), top_p= (say 0.3) or both."
            )
        if self.neighbours is not None and self.neighbours < 0:
            raise UsageError(
                f"neighbours={self.neighbours} is not possible: neighbours is 0 or more, or none."
            )
        if self.compensation not in COMPENSATIONS:
            raise unknown_name("compensation", self.compensation, COMPENSATIONS)
        if self.mass not in MASSES:
            raise unknown_name("mass", self.mass, MASSES)

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """Predict which key blocks matter to each query block, and what the others weigh.

        Args:
            query: `[B, S, H, D]`, post-RoPE, in the layout's order; as is `key`.

        Returns:
            A plan of its own for every batch row and head, with `coarse` weights.
        """
        from dit_accel.methods.parts.budget import choose_blocks
        from dit_accel.methods.parts.compensation import with_compensation
        from dit_accel.methods.parts.force import forced_blocks
        from dit_accel.methods.parts.plans import plan_of
        from dit_accel.methods.parts.score import (
            attention_logits,
            block_means,
            scores_of_means,
            text_scores,
        )

        query_means, key_means = block_means(query, layout), block_means(key, layout)
        scores = scores_of_means(query_means, key_means)
        logits = attention_logits(scores, layout, text_scores(query_means, key, layout))
        forced = forced_blocks(layout, self.neighbours, self.first_frame, self.anchor)
        by_mass = None if self.top_p is None else logits.softmax(-1)
        chosen = choose_blocks(scores, forced, self.keep, self.top_p, by_mass, text_blocks=layout.n_text_blocks)
        plan = plan_of(*chosen, layout, key_means)
        pooled = (logits, query, key, query_means, key_means, layout)
        return with_compensation(plan, self.compensation, self.mass, *pooled)
