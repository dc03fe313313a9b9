"""Block-sparse attention: `block_sparse`, and `choose` / `why_not` that say which implementation runs."""

from .api import IMPLEMENTATIONS, block_sparse, block_sparse_feedback, choose, why_not

__all__ = ["IMPLEMENTATIONS", "block_sparse", "block_sparse_feedback", "choose", "why_not"]
