"""Gradients on `[B, H, S, D]`: choose an implementation, and run it in the plan's token orders."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.kernels.choice import Choice
from dit_accel.kernels.inversion.inverse import bounds
from dit_accel.kernels.reorder import put_rows, take_rows
from dit_accel.plan import BlockPlan

_CHOICE = Choice("the backward of block_sparse_trainable", __package__)


def differentiate(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as in `reference.differentiate`, and a plan that may have orders.

    Args:
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Raises:
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    match choose(q, plan, impl):
        case "reference":
            from .reference import differentiate as run
        case "triton":
            from .triton import differentiate as run
    q_order, k_order = plan.q_order, plan.k_order
    with torch.no_grad():
        if q_order is not None:
            grad_out, q, out = (take_rows(x, q_order) for x in (grad_out, q, out))
            grad_lse, lse = (take_rows(x[..., None], q_order)[..., 0] for x in (grad_lse, lse))
        if k_order is not None:
            k, v = (take_rows(x, k_order) for x in (k, v))
        plan = replace(plan, q_order=None, k_order=None)
        dq, dk, dv = run(grad_out, grad_lse, q, k, v, out, lse, plan, scale)
        # A permutation's transpose is its inverse.
        if q_order is not None:
            dq = put_rows(dq, q_order)
        if k_order is not None:
            dk, dv = (put_rows(x, k_order) for x in (dk, dv))
    return dq, dk, dv


def workspace_bytes(batch: int, heads: int, head: int, plan: BlockPlan) -> int:
    """What "triton" holds beside inputs and gradients: chunks of cut columns, delta, and the inverse of the plan.

    The plan's orders, if it has any, cost a copy of each tensor besides.
    """
    items, slots = bounds(plan.n_q, plan.n_k)
    bitmap = plan.n_q * -(-plan.n_k // 32)
    lists, rows = plan.counts.shape[0] * plan.counts.shape[1], batch * heads
    inverse = lists * (plan.n_k * (plan.n_q + 1) + items * 4 + bitmap)
    return 4 * (inverse + rows * (plan.n_q_tokens + slots * 2 * plan.max_k_block * head))


def choose(q: Tensor, plan: BlockPlan, impl: str = "auto") -> str:
    """The implementation that will run; raises as `differentiate` does."""
    return _CHOICE.choose(impl, q.device.type == "cuda", q, plan)


def why_not(impl: str, q: Tensor, plan: BlockPlan) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, q, plan)
