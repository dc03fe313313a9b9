"""sparge: read what block means say matters, and all of every block whose mean says too little."""

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

_ALWAYS = 1e30  # a score above all others


@dataclass(frozen=True)
class Method:
    """Shares of attention between block means, with a veto for blocks whose tokens point in different directions.

    A block is self-similar if the mean cosine of its tokens is above `similarity`. Key blocks that are not are read by
    all, query blocks that are not read everything, and shares are among self-similar key blocks alone. Cosines of keys
    are taken around the mean key of the head: keys share a large part that softmax does not see.

    Source: SpargeAttn, arXiv:2502.18137, algorithm 1 (Hilbert order, first stage). The published code's recommended
    call sets the veto's threshold to -0.1, where it never speaks. Instead of files tuned beforehand, `l1` has each head
    find its own `top_p` in the first sparse call of a run, on sampled rows (`parts.tuning`).

    With `pv_threshold` there is a second stage: of what the plan lists, the kernel leaves out tiles whose every weight
    it finds to be at most `2 ** pv_threshold` of its row's largest (`kernels.block_sparse.block_sparse`). Published is
    a number for each head from a tuned file, with the sign reversed; here one holds for all heads. The plan does not
    change, so the report's keep counts such tiles as read. Executors without it refuse; "auto" takes another.
    """

    arrangement: ClassVar[Arrangement] = Arrangement("gilbert", 128)

    keep: float | None = None  # share of key blocks to read, forced ones included
    top_p: float | None = None  # read the fewest self-similar blocks that should hold this share
    l1: float | None = (
        None  # each head's own top_p: the least that moves its attention weights by so much in all
    )
    similarity: float = 0.1  # blocks of a mean cosine up to this are not pooled; -1 pools all
    neighbours: int | None = 0  # also read blocks so near; 0 is the own block, none forces nothing
    sink: bool = False  # also read the first block of the video
    # The second stage, in powers of two: -10 leaves out tiles of weights below a thousandth; none leaves out nothing.
    pv_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.keep is None and self.top_p is None and self.l1 is None:
            raise UsageError(
                "Method 'sparge' needs a budget: give keep= (say 0.25), top_p= (say 0.9) or l1= (say 0.2)."
            )
        if self.l1 is not None and (not 0 < self.l1 <= 2 or self.top_p is not None):
            raise UsageError(
                f"l1={self.l1} is not possible: it is above 0 and up to 2, and stands in the place of top_p, "
                f"which is {self.top_p}."
            )
        if not -1 <= self.similarity <= 1:
            raise UsageError(f"similarity={self.similarity} is not possible: it is a mean cosine, -1 to 1.")
        if self.neighbours is not None and self.neighbours < 0:
            raise UsageError(
                f"neighbours={self.neighbours} is not possible: neighbours is 0 or more, or none."
            )
        if self.pv_threshold is not None and not self.pv_threshold <= 0:
            raise UsageError(
                f"pv_threshold={self.pv_threshold} is not possible: it is powers of two relative to a row's largest "
                "weight, at most 0 (say -10), or none."
            )

    def init_state(self, query: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
        """Nothing is tuned yet."""
        return {}

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """Predict which key blocks matter to each query block.

        Args:
            query: `[B, S, H, D]`, post-RoPE, in the layout's order; as is `key`.
            state: with `l1`, what the heads found; None has them look at every call.

        Returns:
            A plan of its own for every batch row and head.
        """

        from dit_accel.methods.parts.budget import choose_blocks
        from dit_accel.methods.parts.force import forced_blocks
        from dit_accel.methods.parts.plans import plan_of
        from dit_accel.methods.parts.score import (
            block_means,
            expected_attention,
            mean_scores,
            self_similarity,
        )
        from dit_accel.methods.parts.tuning import fit_top_p

        key_means = block_means(key, layout)
        scores = mean_scores(query, key_means, layout)
        weights = layout.sizes.to(key.device) / layout.n_tokens
        center = (key_means * weights[:, None]).sum(2, keepdim=True)
        mixed_keys = (self_similarity(key, layout, center) <= self.similarity)[:, :, None, :]
        mixed_queries = (self_similarity(query, layout) <= self.similarity)[..., None]
        # Among pooled keys alone; where there are none everything is read, and shares are never asked.
        shares = expected_attention(scores.masked_fill(mixed_keys, -_ALWAYS), layout).masked_fill(
            mixed_keys, 0
        )
        scores = scores.masked_fill(mixed_keys | mixed_queries, _ALWAYS)
        if self.sink:
            scores[..., layout.video_blocks.start] = _ALWAYS
        forced = forced_blocks(layout, self.neighbours, False)
        top_p = self.top_p
        if self.l1 is not None:
            tuned = {} if state is None else state
            if "top_p" not in tuned:
                tuned["top_p"] = fit_top_p(query, key, scores, shares, layout, self.l1)
            # One budget for all heads, of shares that are larger for those that need less.
            shares, top_p = shares / tuned["top_p"][:, :, None, None], 1.0
        by_mass = None if top_p is None else shares
        budget = dict(above=_ALWAYS, text_blocks=layout.n_text_blocks)
        chosen = choose_blocks(scores, forced, self.keep, top_p, by_mass, **budget)
        return plan_of(*chosen, layout, key_means)
