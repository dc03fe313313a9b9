"""Linear attention as opaque nodes of torch.compile: `torch.ops.dit_accel.linear_attention` and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .api import run, run_backward
from .passes import Blocks


@torch.library.custom_op("dit_accel::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unread: Tensor | None,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q_block: int,
    max_k_block: int,
    feature: str,
    eps: float,
    workspace: int,
    impl: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`api.run` with the blocks' fields in their place."""
    blocks = Blocks(unread, q_starts, k_starts, max_q_block, max_k_block)
    return run(q, k, v, blocks, feature, eps, workspace, impl, weight, bias)


@linear_attention_op.register_fake
def _out(q, k, v, *_rest):
    return torch.empty_like(q)


@torch.library.custom_op("dit_accel::linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    unread: Tensor | None,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q_block: int,
    max_k_block: int,
    feature: str,
    eps: float,
    workspace: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`api.run_backward` with the blocks' fields in their place."""
    blocks = Blocks(unread, q_starts, k_starts, max_q_block, max_k_block)
    return run_backward(q, k, v, grad, blocks, feature, eps, workspace, impl)


@linear_attention_backward_op.register_fake
def _gradients(q, k, v, *_rest):
    return tuple(torch.empty_like(x) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, unread, q_starts, k_starts, *options = inputs
    ctx.save_for_backward(q, k, v, unread, q_starts, k_starts)
    ctx.options = options[:6]  # of the blocks, and how to run; a projection has no gradients


def _backward(ctx, grad: Tensor):
    q, k, v, *blocks = ctx.saved_tensors
    found = torch.ops.dit_accel.linear_attention_backward(q, k, v, grad, *blocks, *ctx.options)
    return *found, *(None for _ in range(11))


linear_attention_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("dit_accel::add_linear_attention", mutates_args=("into",))
def add_linear_attention_op(
    into: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unread: Tensor | None,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q_block: int,
    max_k_block: int,
    feature: str,
    eps: float,
    workspace: int,
    impl: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """`api.run` that adds to `into`, with the blocks' fields in their place."""
    blocks = Blocks(unread, q_starts, k_starts, max_q_block, max_k_block)
    run(q, k, v, blocks, feature, eps, workspace, impl, weight, bias, into)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    feature: str,
    eps: float,
    workspace: int,
    impl: str,
    weight: Tensor | None,
    bias: Tensor | None,
    into: Tensor | None,
) -> Tensor:
    """`api.run` through the operators."""
    fields = blocks.unread, blocks.q_starts, blocks.k_starts, blocks.max_q_block, blocks.max_k_block
    rest = (*fields, feature, eps, workspace, impl, weight, bias)
    if into is None:
        return linear_attention_op(q, k, v, *rest)
    add_linear_attention_op(into, q, k, v, *rest)
    return into
