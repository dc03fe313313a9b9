"""Mixing with block means in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(
    out: Tensor,
    lse: Tensor,
    total: Tensor,
    rest: Tensor | None,
    mixed_in: Tensor,
    starts: Tensor,
    max_block: int,
) -> None:
    """Write the mean of `out` and `mixed_in`, weighed by what they stand for, over `out`.

    Args:
        out: `[B, H, S, D]`.
        lse: `[B, H, S]`, logarithm of what each row of `out` weighs, unless `rest` says so.
        total: `[B, H, N]`, logarithm of what `mixed_in` weighs, for each block of rows.
        rest: `[B, H, N]` or None, in the place of lse.
        mixed_in: `[B, H, N, D]`.
        starts: int32 `[B|1, H|1, N + 1]`.
        max_block: not needed here.
    """
    tokens = torch.arange(out.shape[2], dtype=torch.int32, device=out.device)
    ends = starts[..., 1:].contiguous()
    block = torch.searchsorted(ends, tokens.expand(*ends.shape[:2], -1).contiguous(), right=True)
    for i_b in range(out.shape[0]):
        for i_h in range(out.shape[1]):  # a head at a time: the rows' numbers are as large as the head
            own = block[i_b % block.shape[0], i_h % block.shape[1]]
            weight = lse[i_b, i_h] if rest is None else rest[i_b, i_h, own]
            above = (total[i_b, i_h, own] - weight).to(mixed_in.dtype)
            # Neither read nor stood in for: -inf minus -inf.
            share = torch.sigmoid(above.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))[
                :, None
            ]
            row = out[i_b, i_h]
            row.copy_((1 - share) * row.to(mixed_in.dtype) + share * mixed_in[i_b, i_h, own])
