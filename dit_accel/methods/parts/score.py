"""Score: how much attention each query block is expected to give to each key block."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels import pooling
from dit_accel.layout import TokenLayout


def block_means(x: Tensor, layout: TokenLayout) -> Tensor:
    """Average the tokens of each block, in fp32 also for low-precision input.

    Args:
        x: `[B, S, H, D]`, tokens in the layout's order.

    Returns:
        fp32 `[B, H, N, D]`.
    """
    return pooling.block_means(x, layout.starts.to(x.device), layout.max_block)


def mean_scores(query: Tensor, key_means: Tensor, layout: TokenLayout) -> Tensor:
    """Attention logits between the means of every query block and every key block.

    Args:
        query: `[B, S, H, D]`, post-RoPE, in the layout's order.
        key_means: fp32 `[B, H, N, D]`, from `block_means`.

    Returns:
        fp32 `[B, H, N, N]`.
    """
    return block_means(query, layout) @ key_means.transpose(-1, -2) * query.shape[-1] ** -0.5


def expected_attention(scores: Tensor, layout: TokenLayout) -> Tensor:
    """Share of attention each key block would take if every token were its block's mean.

    A key block of b tokens appears b times in that softmax, hence the logarithm of its size.

    Args:
        scores: fp32 `[B, H, N, N]`, from `mean_scores`.

    Returns:
        fp32 `[B, H, N, N]`, rows summing to one.
    """
    return torch.softmax(scores + layout.sizes.to(scores.device).log(), dim=-1)
