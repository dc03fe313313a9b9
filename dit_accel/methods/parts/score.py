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
    return scores_of_means(block_means(query, layout), key_means)


def scores_of_means(query_means: Tensor, key_means: Tensor) -> Tensor:
    """`mean_scores` of queries that are pooled already; both fp32 `[B, H, N, D]`."""
    return query_means @ key_means.transpose(-1, -2) * query_means.shape[-1] ** -0.5


def expected_attention(scores: Tensor, layout: TokenLayout, text: Tensor | None = None) -> Tensor:
    """Share of attention each key block would take, rows summing to one; fp32, see `attention_logits`."""
    return torch.softmax(attention_logits(scores, layout, text), dim=-1)


def attention_logits(scores: Tensor, layout: TokenLayout, text: Tensor | None = None) -> Tensor:
    """Logarithm of the attention mass each key block would have if every video token were its block's mean.

    A key block of b tokens appears b times in that softmax, hence the logarithm of its size. Text is few tokens that
    differ much, so they are taken one by one: their mean would say little (isolated pooling and its reallocation,
    Rectified SpaAttn, arXiv:2511.19835: a pooled column stands for b tokens, a text column for one).

    Args:
        scores: fp32 `[B, H, N, N]`, from `mean_scores`.
        text: fp32 `[B, H, N, n]`, from `text_scores`; needed where the layout has text.

    Returns:
        fp32 `[B, H, N, N]`, in the units of an executor's lse.
    """
    logits = scores + layout.sizes.to(scores.device).log()
    if text is not None:
        video = logits[..., layout.video_blocks]
        logits = torch.cat([text, video] if layout.text_first else [video, text], dim=-1)
    return logits


def text_scores(query_means: Tensor, key: Tensor, layout: TokenLayout) -> Tensor | None:
    """Logits of whole text blocks, every text key for itself: the logarithm of their summed exponentials.

    Args:
        query_means: fp32 `[B, H, N, D]`.
        key: `[B, S, H, D]`.

    Returns:
        fp32 `[B, H, N, n]`, a column for each text block; None where the layout has no text.
    """
    if not layout.text:
        return None
    keys = key[:, layout.text_tokens].transpose(1, 2).to(query_means.dtype)
    logits = query_means @ keys.transpose(-1, -2) * query_means.shape[-1] ** -0.5
    return torch.stack([part.logsumexp(-1) for part in logits.split(layout.block, dim=-1)], dim=-1)


def self_similarity(x: Tensor, layout: TokenLayout, center: Tensor | None = None) -> Tensor:
    """Mean cosine of all pairs of tokens of each block.

    Args:
        x: `[B, S, H, D]`, tokens in the layout's order.
        center: fp32 `[B, H, 1, D]`, taken from every token first; or None.

    Returns:
        fp32 `[B, H, N]`; 1 where all tokens of a block point the same way.
    """
    directions = pooling.block_directions(x, layout.starts.to(x.device), layout.max_block, center)
    return directions.square().sum(-1)
