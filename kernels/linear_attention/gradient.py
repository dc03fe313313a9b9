"""Linear attention for autograd, outside of torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .api import run, run_backward
from .passes import Blocks


class LinearAttention(torch.autograd.Function):
    """`api.run` without a projection, differentiable once in q, k and v."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *options) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.options = blocks, options
        return run(q, k, v, blocks, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        found = run_backward(*ctx.saved_tensors, grad, ctx.blocks, *ctx.options)
        return *found, None, *(None for _ in ctx.options)
