"""What a call is asked to tell beside its result: which entries of the lists mattered."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Feedback:
    """A question to an implementation, and where its answer goes. The formula: `api.block_sparse_feedback`."""

    threshold: float  # in powers of two, at most 0
    needed: Tensor  # uint8 [B, H, Nq, M], zeroed; 1 is written for every list entry that mattered
