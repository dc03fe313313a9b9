"""Trainable block-sparse attention as operators with an autograd formula, for eager mode and torch.compile alike.

`torch.ops.dit_accel.block_sparse_trainable` and `block_sparse_backward`. One path for both: an autograd function of our
own would have to be traced by the compiler, which the kernels' launchers cannot be.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.plan import BlockPlan

from .api import as_they_came, choose, in_order, run
from .backward import choose as choose_backward
from .backward import differentiate
from .op import fields_of, plan_of, shapes_of


@torch.library.custom_op("dit_accel::block_sparse_trainable", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_order: Tensor | None,
    k_order: Tensor | None,
    host: list[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`block_sparse` on `[B, H, S, D]`, with a plan's fields and orders in its place, as in `op.block_sparse_op`."""
    plan = replace(plan_of(q, k, counts, indices, q_starts, k_starts, host), q_order=q_order, k_order=k_order)
    with torch.no_grad():
        return as_they_came(*run(*in_order(q, k, v, plan), scale, impl), plan)


@forward_op.register_fake
def _outputs(q, k, v, counts, indices, q_starts, k_starts, q_order, k_order, host, scale, impl):
    out, lse = shapes_of(q)
    return (out if q_order is None else q.new_empty(q.shape)), lse


@torch.library.custom_op("dit_accel::block_sparse_backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_order: Tensor | None,
    k_order: Tensor | None,
    host: list[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward.differentiate` with a plan's fields in its place; `impl` is the backward's."""
    plan = replace(plan_of(q, k, counts, indices, q_starts, k_starts, host), q_order=q_order, k_order=k_order)
    return differentiate(grad_out, grad_lse, q, k, v, out, lse, plan, scale, impl)


@backward_op.register_fake
def _gradients(
    grad_out, grad_lse, q, k, v, out, lse, counts, indices, q_starts, k_starts, q_order, k_order, *rest
):
    dq = torch.empty_like(q) if q_order is None else q.new_empty(q.shape)
    dk, dv = (torch.empty_like(x) if k_order is None else x.new_empty(x.shape) for x in (k, v))
    return dq, dk, dv


def _keep(ctx, inputs, output) -> None:
    q, k, v, *plan, ctx.host, ctx.scale, impl = inputs
    ctx.save_for_backward(q, k, v, *output, *plan)
    ctx.impl = backward_impl(impl)


def _differentiate(ctx, grad_out: Tensor, grad_lse: Tensor):
    gradients = backward_op(grad_out, grad_lse, *ctx.saved_tensors, ctx.host, ctx.scale, ctx.impl)
    return (*gradients, *(None,) * 9)


def _refuse(ctx, *_gradients):
    raise UsageError(
        "block_sparse_trainable has no second derivative: take its gradient without create_graph=True."
    )


forward_op.register_autograd(_differentiate, setup_context=_keep)
backward_op.register_autograd(_refuse)


def backward_impl(impl: str) -> str:
    """Which backward goes with a forward's implementation."""
    if impl == "auto":
        return impl
    return "reference" if impl in ("reference", "cpu") else "triton"


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """Validated `[B, H, S, D]` through the operator. What the backward cannot do is said before the forward runs."""
    if not torch.compiler.is_compiling():
        choose(q, k, v, plan, impl)
        choose_backward(q, plan, backward_impl(impl))
    counts, indices, q_starts, k_starts, host = fields_of(plan)
    return forward_op(
        q, k, v, counts, indices, q_starts, k_starts, plan.q_order, plan.k_order, host, scale, impl
    )
