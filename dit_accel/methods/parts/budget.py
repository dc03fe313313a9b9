"""Budget: how many of the scored blocks each query block reads, and which."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def blocks_for(keep: float, n_blocks: int) -> int:
    """Key blocks that a share stands for: rounded up, at least one."""
    return max(1, math.ceil(keep * n_blocks - 1e-9))  # 0.1 * 30 is 3.0000000000000004


def choose_blocks(
    scores: Tensor,
    forced: Tensor | None,
    keep: float | None,
    top_p: float | None = None,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose key blocks by score: the forced ones, then the best until both budgets are met.

    A block of higher score comes first, of equal score the lower index. The same scores always give the same
    choice.

    Args:
        scores: fp32 `[B, H, Nq, Nk]`, how much a token of each key block matters. Per token, not per block: a
            larger block matters more in proportion but costs as much more, so ranking by the whole would read
            more tokens than the share of blocks says.
        forced: bool `[Nq, Nk]` or None.
        keep: share of the key blocks to read, forced ones included.
        top_p: read the first blocks that together reach this much of `shares`.
        shares: fp32 like scores, the attention each key block is expected to take; `top_p` needs it.

    Returns:
        counts int32 `[B, H, Nq]` and indices int32 `[B, H, Nq, M]`, ascending up to the count; what stands
        behind the count repeats the last block and is not read.
    """
    n_keys = scores.shape[-1]
    ranked = scores if forced is None else scores.masked_fill(forced, torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    least = 1 if keep is None else blocks_for(keep, n_keys)
    counts = torch.full(scores.shape[:-1], least, dtype=torch.int32, device=scores.device)
    if forced is not None:
        counts = counts.maximum(forced.sum(-1, dtype=torch.int32))
    if top_p is not None:
        assert shares is not None
        mass = shares.gather(-1, order).cumsum(-1)
        reached = (mass < top_p).sum(-1, dtype=torch.int32) + 1
        counts = counts.maximum(reached.clamp_max(n_keys))
    if top_p is None and forced is None:
        return counts, order[..., :least].sort(dim=-1).values.to(torch.int32)
    # Rows differ in length: what a row does not read sorts behind what it reads.
    behind = torch.arange(n_keys, device=scores.device) >= counts[..., None]
    indices = order.masked_fill(behind, n_keys).sort(dim=-1).values.clamp_max(n_keys - 1)
    return counts, indices.to(torch.int32)
