"""Counting as one opaque node of torch.compile: `torch.ops.dit_accel.count_pairs`."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan

from .api import run


@torch.library.custom_op("dit_accel::count_pairs", mutates_args=())
def count_pairs_op(
    counts: Tensor, indices: Tensor, q_starts: Tensor, k_starts: Tensor, host: list[int], impl: str
) -> Tensor:
    """As `api.count_pairs`; host: the plan's four host numbers."""
    return run(BlockPlan(counts, indices, q_starts, k_starts, *host), impl)


@count_pairs_op.register_fake
def _shape(counts, indices, q_starts, k_starts, host, impl):
    return counts.new_empty((), dtype=torch.int64)


def count_pairs(plan: BlockPlan, impl: str) -> Tensor:
    """`api.run` through the operator."""
    host = [plan.n_q_tokens, plan.n_k_tokens, plan.max_q_block, plan.max_k_block]
    return count_pairs_op(plan.counts, plan.indices, plan.q_starts, plan.k_starts, host, impl)
