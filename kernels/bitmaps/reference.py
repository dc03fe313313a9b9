"""Bitmaps in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 32


def pack_lists(counts: Tensor, indices: Tensor, n_k: int) -> Tensor:
    """The bitmap of some lists; arguments as in `api.run_pack`."""
    words = -(-n_k // BITS)
    slot = torch.arange(indices.shape[3], device=indices.device)
    # Entries behind the count go to a column that is cut off again.
    column = torch.where(slot < counts[..., None], indices, words * BITS).long()
    mask = torch.zeros(*counts.shape, words * BITS + 1, dtype=torch.int64, device=counts.device)
    mask = mask.scatter_(-1, column, 1)[..., :-1].unflatten(-1, (words, BITS))
    packed = (mask << torch.arange(BITS, device=counts.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_lists(bits: Tensor, n_k: int) -> tuple[Tensor, Tensor]:
    """The lists of a bitmap; arguments and results as in `api.unpack_lists`."""
    mask = (bits[..., None] >> torch.arange(BITS, dtype=torch.int32, device=bits.device)) & 1
    mask = mask.flatten(-2)[..., :n_k] != 0
    block = torch.arange(n_k, dtype=torch.int32, device=bits.device)
    # Blocks that are not set sort behind every one that is.
    order = torch.where(mask, block, block + n_k).sort(dim=-1).values
    return mask.sum(-1, dtype=torch.int32), order % n_k
