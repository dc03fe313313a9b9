"""Mixing with block means in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(out: Tensor, rest: Tensor, added: Tensor, starts: Tensor, max_block: int) -> None:
    """Write `rest out + added` over `out`, each row with the numbers of its block.

    Args:
        out: `[B, H, S, D]`.
        rest: `[B, H, N]`.
        added: `[B, H, N, D]`.
        starts: int32 `[B|1, H|1, N + 1]`.
        max_block: not needed here.
    """
    tokens = torch.arange(out.shape[2], dtype=torch.int32, device=out.device)
    ends = starts[..., 1:].contiguous()
    block = torch.searchsorted(ends, tokens.expand(*ends.shape[:2], -1).contiguous(), right=True)
    for i_b in range(out.shape[0]):
        for i_h in range(out.shape[1]):  # a head at a time: the rows' numbers are as large as the head
            own = block[i_b % block.shape[0], i_h % block.shape[1]]
            row = out[i_b, i_h]
            mixed = row.to(added.dtype) * rest[i_b, i_h, own, None].to(added.dtype) + added[i_b, i_h, own]
            row.copy_(mixed)
