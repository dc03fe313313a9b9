"""Block selection in plain torch: sort by score, cut at the budget, sort what is left by index."""

from __future__ import annotations

import torch
from torch import Tensor


def select_blocks(
    scores: Tensor,
    forced: Tensor | None,
    least: int | Tensor,
    top_p: float | Tensor | None,
    shares: Tensor | None,
    above: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `api.select_blocks`."""
    n_keys = scores.shape[-1]
    ranked = scores if forced is None else scores.masked_fill(forced, torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    counts = torch.ones(scores.shape[:-1], dtype=torch.int32, device=scores.device)
    counts = counts * (least.clamp(1, n_keys) if isinstance(least, Tensor) else least)
    if forced is not None:
        counts = counts.maximum(forced.sum(-1, dtype=torch.int32))
    if top_p is not None:
        mass = shares.gather(-1, order).cumsum(-1)
        reached = (mass < top_p).sum(-1, dtype=torch.int32) + 1
        counts = counts.maximum(reached.clamp_max(n_keys))
    if above is not None:
        wanted = scores >= above
        wanted = wanted if forced is None else wanted | forced
        counts = counts.maximum(wanted.sum(-1, dtype=torch.int32))
    if top_p is None and forced is None and above is None and not isinstance(least, Tensor):
        return counts, order[..., :least].sort(dim=-1).values.to(torch.int32)
    # Rows differ in length: what a row does not read sorts behind what it reads.
    behind = torch.arange(n_keys, device=scores.device) >= counts[..., None]
    indices = order.masked_fill(behind, n_keys).sort(dim=-1).values.clamp_max(n_keys - 1)
    return counts, indices.to(torch.int32)
