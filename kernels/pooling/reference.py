"""Mean pooling in plain torch: one bag per block. Computes in float32, or float64 for float64 input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A copy in full precision is made for so many heads at a time, to keep peak memory below dense attention's.
_HEADS_AT_ONCE = 8


def block_means(x: Tensor, starts: Tensor, max_block: int) -> Tensor:
    """Arguments and result as in `api.block_means`."""
    if starts.shape[1] > 1:  # every head has blocks of its own
        parts = [block_means(x[:, :, h : h + 1], starts[:, h : h + 1], max_block) for h in range(x.shape[2])]
        return torch.cat(parts, dim=1)
    full = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype != full and x.shape[2] > _HEADS_AT_ONCE:
        parts = [block_means(part, starts, max_block) for part in x.split(_HEADS_AT_ONCE, dim=2)]
        return torch.cat(parts, dim=1)
    batch, tokens, heads, dim = x.shape
    rows = x.to(full).reshape(batch * tokens, heads * dim)
    # the bags of one batch row follow those of the row before
    base = torch.arange(batch, device=x.device)[:, None] * tokens
    offsets = (base + starts[:, 0, :-1]).flatten()
    means = F.embedding_bag(torch.arange(batch * tokens, device=x.device), rows, offsets, mode="mean")
    return means.view(batch, starts.shape[2] - 1, heads, dim).transpose(1, 2)
