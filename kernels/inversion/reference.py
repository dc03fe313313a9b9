"""Inversion in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .inverse import FIELDS, SHORTEST, bounds, most_chunks


def invert_lists(counts: Tensor, indices: Tensor, n_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, lists and items of the inverse; arguments as in `api.run`."""
    n_q = counts.shape[2]
    slot = torch.arange(indices.shape[3], device=indices.device)
    # Entries behind the count go to a column that is cut off again.
    column = torch.where(slot < counts[..., None], indices, n_k).long()
    mask = torch.zeros(*counts.shape, n_k + 1, dtype=torch.bool, device=counts.device)
    mask = mask.scatter_(-1, column, True)[..., :n_k].transpose(2, 3).contiguous()
    block = torch.arange(n_q, dtype=torch.int32, device=counts.device)
    # Blocks that do not read sort behind every one that does.
    lists = torch.where(mask, block, block + n_q).sort(dim=-1).values % n_q
    read = mask.sum(-1, dtype=torch.int32)
    return read, lists, cut_columns(read, n_q)


def cut_columns(counts: Tensor, n_q: int) -> Tensor:
    """The work items, int32 `[B, H, W, 4]`, of columns with these counts `[B, H, Nk]` (`Inverse`)."""
    n_k = counts.shape[2]
    n_items, _ = bounds(n_q, n_k)
    longest = -(-counts.sum(-1, keepdim=True) // most_chunks(n_k))
    longest = longest.clamp_min(SHORTEST)
    chunks = (-(-counts // longest)).clamp_min(1)
    # Cut columns before whole ones, each in their order; the sum of those before is where a column begins.
    key = torch.arange(n_k, device=counts.device)
    order = torch.where(chunks > 1, key, key + n_k).argsort(-1)
    ends = chunks.gather(2, order).cumsum(-1)
    place = torch.arange(n_items, device=counts.device).expand(*counts.shape[:2], n_items).contiguous()
    nth = torch.searchsorted(ends, place, right=True)
    there = nth < n_k
    nth = nth.clamp_max(n_k - 1)
    column = order.gather(2, nth)
    entries, parts = counts.gather(2, column), chunks.gather(2, column)
    step = -(-entries // parts)
    first = step * (place - (ends.gather(2, nth) - parts))
    items = torch.stack([column, first, torch.minimum(step, entries - first), parts], -1)
    nothing = torch.tensor([-1, 0, 0, 0], device=counts.device)
    return torch.where(there[..., None], items, nothing).to(torch.int32).view(*counts.shape[:2], -1, FIELDS)
