"""Compaction as one opaque node of torch.compile: `torch.ops.dit_accel.compact_lists`."""

from __future__ import annotations

import torch
from torch import Tensor

from .api import run


@torch.library.custom_op("dit_accel::compact_lists", mutates_args=())
def compact_lists_op(
    counts: Tensor, indices: Tensor, needed: Tensor, forced: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """As `api.run`."""
    return run(counts, indices, needed, forced, impl)


@compact_lists_op.register_fake
def _shapes(counts, indices, needed, forced, impl):
    return needed.new_empty(needed.shape[:3], dtype=torch.int32), torch.empty_like(needed, dtype=torch.int32)


def compact_lists(
    counts: Tensor, indices: Tensor, needed: Tensor, forced: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """`api.run` through the operator."""
    return compact_lists_op(counts, indices, needed, forced, impl)
