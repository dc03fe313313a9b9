"""Tuning: how much of the predicted attention each head has to read to stay near the true one."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.pooling import block_means
from dit_accel.layout import TokenLayout
from dit_accel.methods.parts.cluster import spread_tokens

ROWS = 64  # query tokens tried
CHOICES = 50  # values of top_p tried, in equal steps up to 1
_HEADS_AT_ONCE = 4  # whose scores are held together


def fit_top_p(
    query: Tensor, key: Tensor, scores: Tensor, shares: Tensor, layout: TokenLayout, l1: float
) -> Tensor:
    """The least `top_p` with which each head's attention weights stay within an L1 distance of dense ones.

    Leaving out keys that hold a share m of a row's attention and renormalising the rest moves its weights by 2 m in
    all. So the mean share that sampled rows read must be at least `1 - l1 / 2`. Nothing waits for the device.

    Args:
        query, key: `[B, S, H, D]`, in the layout's order.
        scores: fp32 `[B, H, N, N]`, by which blocks are ranked.
        shares: fp32 `[B, H, N, N]`, of which the best blocks shall hold `top_p`.
        l1: above 0, at most 2.

    Returns:
        fp32 `[B, H]`; 1 where no choice is near enough.

    Source: SpargeAttn (arXiv:2502.18137, section 3.6) tunes each head to a relative L1 distance of outputs, which needs
    the values; this is the same of weights.
    """
    rows = layout.video_tokens.start + spread_tokens(layout.n_video_tokens, ROWS, query.device)
    ends = layout.starts[0, 0, 1:].to(query.device)
    block = torch.searchsorted(ends, rows.to(torch.int32), right=True)
    order = scores[:, :, block].argsort(dim=-1, descending=True, stable=True)
    predicted = shares[:, :, block].gather(3, order).cumsum(3)
    true = _block_masses(query[:, rows], key, layout).gather(3, order).cumsum(3)
    choices = torch.linspace(1 / CHOICES, 1, CHOICES, device=query.device)
    # The first place where the predicted share reaches a choice, as the budget reads.
    place = torch.searchsorted(predicted, choices.expand(*predicted.shape[:3], -1).contiguous())
    covered = true.gather(3, place.clamp_max(true.shape[3] - 1)).mean(2)
    near = covered >= 1 - l1 / 2
    near[..., -1] = True
    return choices[near.int().argmax(-1)]


def _block_masses(rows: Tensor, key: Tensor, layout: TokenLayout) -> Tensor:
    """Share of each row's true attention that each key block holds, fp32 `[B, H, R, N]`. rows: `[B, R, H, D]`."""
    starts, sizes = layout.starts.to(key.device), layout.sizes.to(key.device)
    parts = []
    for some in range(0, key.shape[2], _HEADS_AT_ONCE):
        heads = slice(some, some + _HEADS_AT_ONCE)
        q, k = (x[:, :, heads].transpose(1, 2).float() for x in (rows, key))
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)  # [B, h, R, S]
        parts.append(block_means(weights.permute(0, 3, 1, 2), starts, layout.max_block) * sizes[:, None])
    return torch.cat(parts, dim=1).transpose(2, 3)
