"""Mean pooling in plain torch: one bag per block. Computes in float32, or float64 for float64 input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A copy in full precision is made for so many heads at a time, to keep peak memory below dense attention's.
_HEADS_AT_ONCE = 8


def block_means(
    x: Tensor, starts: Tensor, max_block: int, of: str = "values", center: Tensor | None = None
) -> Tensor:
    """Arguments and result as in `api.run`."""
    if starts.shape[1] > 1 or of != "values":  # every head has blocks of its own, or is widened for itself
        parts = [
            _means_of_head(x[:, :, h : h + 1], starts[:, h % starts.shape[1], None], max_block, of, own)
            for h, own in enumerate([None] * x.shape[2] if center is None else center.unbind(1))
        ]
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


def _means_of_head(x: Tensor, starts: Tensor, max_block: int, of: str, center: Tensor | None) -> Tensor:
    """One head, `[B, S, 1, D]`; center `[B, N | 1, D]`."""
    if of != "values":
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if center is not None:
        if center.shape[1] > 1:
            tokens = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand(starts.shape[0], -1)
            block = torch.searchsorted(starts[:, 0, 1:].contiguous(), tokens.contiguous(), right=True)
            center = center.gather(1, block[..., None].expand(len(center), -1, center.shape[2]))
        x = x - center[:, :, None]
    if of == "deviations":
        x = x.abs()
    elif of == "directions":
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return block_means(x, starts, max_block)
