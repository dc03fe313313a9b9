"""Score: how much attention each query block is expected to give to each key block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.layout import TokenLayout

# A fp32 copy of low-precision input is made for so many heads at a time, to keep peak memory below dense
# attention's.
_HEADS_AT_ONCE = 8


def block_means(x: Tensor, layout: TokenLayout) -> Tensor:
    """Average the tokens of each block, in fp32 also for low-precision input.

    Sums run in token order without atomics, so equal input gives equal means.

    Args:
        x: `[B, S, H, D]`, tokens in the layout's order.

    Returns:
        fp32 `[B, H, N, D]`.
    """
    if x.dtype != torch.float32 and x.shape[2] > _HEADS_AT_ONCE:
        return torch.cat([block_means(part, layout) for part in x.split(_HEADS_AT_ONCE, dim=2)], dim=1)
    batch, tokens, heads, dim = x.shape
    rows = x.float().reshape(batch * tokens, heads * dim)
    starts = layout.starts.view(-1).to(x.device, torch.int64)
    # one bag per block; the bags of one batch row follow those of the row before
    offsets = (torch.arange(batch, device=x.device)[:, None] * tokens + starts[:-1]).flatten()
    means = F.embedding_bag(torch.arange(batch * tokens, device=x.device), rows, offsets, mode="mean")
    return means.view(batch, layout.n_blocks, heads, dim).transpose(1, 2)


def mean_scores(query: Tensor, key: Tensor, layout: TokenLayout) -> Tensor:
    """Attention logits between the means of every query block and every key block.

    Args:
        query: `[B, S, H, D]`, post-RoPE, in the layout's order; as is `key`.

    Returns:
        fp32 `[B, H, N, N]`.
    """
    queries, keys = block_means(query, layout), block_means(key, layout)
    return queries @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5


def expected_attention(scores: Tensor, layout: TokenLayout) -> Tensor:
    """Share of attention each key block would take if every token were its block's mean.

    A key block of b tokens appears b times in that softmax, hence the logarithm of its size.

    Args:
        scores: fp32 `[B, H, N, N]`, from `mean_scores`.

    Returns:
        fp32 `[B, H, N, N]`, rows summing to one.
    """
    return torch.softmax(scores + layout.sizes.to(scores.device).log(), dim=-1)
