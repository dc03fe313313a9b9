"""Block means as further keys and values, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 2048  # their scores with all means are held at once


def attend_on(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    coarse: Tensor,
    starts: Tensor,
    max_block: int,
    scale: float,
) -> None:
    """Let every row's attention go on over block means; writes over `out`.

    Args:
        out, q: `[B, H, S, D]`.
        lse: `[B, H, S]`, logarithm of what each row of `out` weighs.
        keys, values: `[B, H, M, D]`, the means.
        coarse: `[B, H, N, M]`, added to the rows' scores.
        starts: int32 `[B|1, H|1, N + 1]`, the rows' blocks.
        max_block: not needed here.
        scale: factor of the scores.
    """
    block = _block_of(starts, out.shape[2])
    for i_b in range(out.shape[0]):
        for i_h in range(out.shape[1]):
            own = block[i_b % block.shape[0], i_h % block.shape[1]]
            k, v, c = keys[i_b, i_h], values[i_b, i_h], coarse[i_b, i_h]
            for first in range(0, out.shape[2], _ROWS_AT_ONCE):
                rows = slice(first, first + _ROWS_AT_ONCE)
                scores = q[i_b, i_h, rows].to(k.dtype) @ k.T * scale + c[own[rows]]
                scores = torch.cat([lse[i_b, i_h, rows, None].to(k.dtype), scores], 1)
                # Neither read nor stood in for: a softmax of nothing.
                weights = scores.softmax(-1).nan_to_num(0.0)
                read = out[i_b, i_h, rows].to(k.dtype)
                out[i_b, i_h, rows] = (weights[:, :1] * read + weights[:, 1:] @ v).to(out.dtype)


def mix(out: Tensor, above: Tensor, mixed_in: Tensor, starts: Tensor, max_block: int) -> None:
    """Write the mean of `out` and `mixed_in`, weighed by what they stand for, over `out`.

    Args:
        out: `[B, H, S, D]`.
        above: `[B, H, N]`, logarithm of how many times as much `mixed_in` weighs, for each block of rows.
        mixed_in: `[B, H, N, D]`.
        starts: int32 `[B|1, H|1, N + 1]`.
        max_block: not needed here.
    """
    block = _block_of(starts, out.shape[2])
    share = torch.sigmoid(above.to(mixed_in.dtype)).nan_to_num(0.0)  # -inf minus -inf: nothing stands in
    for i_b in range(out.shape[0]):
        for i_h in range(out.shape[1]):  # a head at a time: the rows' numbers are as large as the head
            own = block[i_b % block.shape[0], i_h % block.shape[1]]
            part = share[i_b, i_h, own, None]
            row = out[i_b, i_h]
            row.copy_((1 - part) * row.to(mixed_in.dtype) + part * mixed_in[i_b, i_h, own])


def _block_of(starts: Tensor, tokens: int) -> Tensor:
    """The block each token is in, `[B|1, H|1, S]`."""
    place = torch.arange(tokens, dtype=torch.int32, device=starts.device)
    ends = starts[..., 1:].contiguous()
    return torch.searchsorted(ends, place.expand(*ends.shape[:2], -1).contiguous(), right=True)
