"""Block-sparse attention as one opaque node of torch.compile: `torch.ops.dit_accel.block_sparse`."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan

from .api import run

HOST = ("max_q_block", "max_k_block", "even_k", "even_q")  # what of a plan the host knows


@torch.library.custom_op("dit_accel::block_sparse", mutates_args=())
def block_sparse_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    host: list[int],
    scale: float,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """`api.run` with a plan's fields in its place.

    Args:
        q, k, v: `[B, H, S, D]`.
        host: the plan's `max_q_block`, `max_k_block`, `even_k` and `even_q`.
    """
    known = dict(zip(HOST, host[:2] + [bool(x) for x in host[2:]], strict=True))
    plan = BlockPlan(counts, indices, q_starts, k_starts, q.shape[2], k.shape[2], **known)
    return run(q, k, v, plan, scale, impl, precision)


@block_sparse_op.register_fake
def _shapes(q, k, v, counts, indices, q_starts, k_starts, host, scale, impl, precision):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=dtype)


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, impl: str, precision: str
) -> tuple[Tensor, Tensor]:
    """`api.run` through the operator."""
    fields = (plan.counts, plan.indices, plan.q_starts, plan.k_starts)
    host = [int(getattr(plan, name)) for name in HOST]
    return block_sparse_op(q, k, v, *fields, host, scale, impl, precision)
