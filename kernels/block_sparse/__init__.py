"""Block-sparse attention: `block_sparse` and, for training, `block_sparse_trainable`; `choose` / `why_not` say which
implementation runs."""

from .api import IMPLEMENTATIONS, block_sparse, block_sparse_feedback, choose, why_not
from .trainable import block_sparse_trainable

__all__ = [
    "IMPLEMENTATIONS",
    "block_sparse",
    "block_sparse_feedback",
    "block_sparse_trainable",
    "choose",
    "why_not",
]
