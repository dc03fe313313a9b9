"""What executors ask for that know blocks of one size only."""

from __future__ import annotations

from dit_accel.plan import BlockPlan

SIZE = 128  # tokens of a block, on both sides


def why_uneven(plan: BlockPlan) -> str | None:
    """Why the plan's blocks are not all of `SIZE` tokens, the last one of each side shorter at most; or None."""
    for side, even, longest, tokens, blocks in (
        ("query", plan.even_q, plan.max_q_block, plan.n_q_tokens, plan.n_q),
        ("key", plan.even_k, plan.max_k_block, plan.n_k_tokens, plan.n_k),
    ):
        if not even or longest != SIZE or blocks != -(-tokens // SIZE):
            return f"it needs {side} blocks of {SIZE} tokens each, as token orders 'packed' and 'raster' make them."
    return None
