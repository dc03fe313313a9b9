"""Block-sparse attention as one opaque node of torch.compile: `torch.ops.dit_accel.block_sparse`."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan

from .api import run, run_feedback

HOST = ("max_q_block", "max_k_block", "even_k", "even_q", "longest_first")  # what of a plan the host knows


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
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`api.run` with a plan's fields in its place.

    Args:
        q, k, v: `[B, H, S, D]`.
        host: the plan's fields that `HOST` names.
    """
    plan = plan_of(q, k, counts, indices, q_starts, k_starts, host)
    return run(q, k, v, plan, scale, impl, precision, pv_threshold=pv_threshold)


@block_sparse_op.register_fake
def _shapes(q, k, v, counts, indices, q_starts, k_starts, host, scale, impl, precision, pv_threshold=None):
    return shapes_of(q)


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    impl: str,
    precision: str,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`api.run` through the operator."""
    return block_sparse_op(q, k, v, *fields_of(plan), scale, impl, precision, pv_threshold)


@torch.library.custom_op("dit_accel::block_sparse_feedback", mutates_args=())
def block_sparse_feedback_op(
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
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`api.run_feedback` with a plan's fields in its place; arguments as in `block_sparse_op`."""
    plan = plan_of(q, k, counts, indices, q_starts, k_starts, host)
    return run_feedback(q, k, v, plan, scale, impl, precision, threshold)


@block_sparse_feedback_op.register_fake
def _feedback_shapes(q, k, v, counts, indices, q_starts, k_starts, host, scale, impl, precision, threshold):
    return *shapes_of(q), q.new_empty((*q.shape[:2], *indices.shape[2:]), dtype=torch.bool)


def block_sparse_feedback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    impl: str,
    precision: str,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`api.run_feedback` through the operator."""
    return block_sparse_feedback_op(q, k, v, *fields_of(plan), scale, impl, precision, threshold)


def shapes_of(q: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors like out and lse."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=dtype)


def fields_of(plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """What of a plan an operator is given: its tensors and `HOST`."""
    host = [int(getattr(plan, name)) for name in HOST]
    return plan.counts, plan.indices, plan.q_starts, plan.k_starts, host


def plan_of(q, k, counts, indices, q_starts, k_starts, host) -> BlockPlan:
    """The plan again, from `fields_of`."""
    known = dict(zip(HOST, host[:2] + [bool(x) for x in host[2:]], strict=True))
    return BlockPlan(counts, indices, q_starts, k_starts, q.shape[2], k.shape[2], **known)
