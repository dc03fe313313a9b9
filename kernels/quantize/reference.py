"""Quantisation in plain torch: scatter tokens to padded blocks, scale by the largest magnitude, round."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan

from .api import KEY_ORDER, ROWS, SMALLEST_SCALE, Mode, Quantised


def quantize_blocks(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, plan: BlockPlan, mode: Mode) -> Quantised:
    """Arguments and results as in `api.quantize_blocks`."""
    q, k, full = q.float(), k.float(), v.float()
    mean = mean[:, :, None]
    q_rows = pad_blocks(q, plan.q_starts)
    k_rows = pad_blocks(k - mean, plan.k_starts).unflatten(2, (-1, ROWS))
    q_scale = _scale(q_rows, (3,), mode.scores)
    k_scale = _scale(k_rows, (3, 4), mode.scores)
    v_rows = pad_blocks(full, plan.k_starts)
    if mode.values is None:
        v8, v_scale = v_rows.to(v.dtype), torch.ones_like(full[:, :, 0])
    else:
        v_scale = _scale(full, (2,), mode.values)
        k_rows = k_rows[..., in_key_order(q.device), :]
        v8 = _round(v_rows, v_scale[:, :, None], mode.values).transpose(2, 3).contiguous()
    return Quantised(
        mode=mode,
        q8=_round(q_rows, q_scale[..., None], mode.scores),
        q_scale=q_scale,
        shift=(q_rows @ mean.transpose(2, 3))[..., 0],
        k8=_round(k_rows, k_scale[..., None, None], mode.scores).flatten(2, 3),
        k_scale=k_scale,
        v8=v8,
        v_scale=v_scale,
    )


def pad_blocks(x: Tensor, starts: Tensor) -> Tensor:
    """Move every block of `[B, H, S, D]` to a multiple of `ROWS` rows: `[B, H, N * ROWS, D]`, zeros behind it."""
    batch, heads, tokens, _ = x.shape
    starts = starts.expand(batch, heads, -1).long()
    slot = torch.arange(ROWS, device=x.device)
    place = starts[..., :-1, None] + slot  # [B, H, N, ROWS]
    inside = (place < starts[..., 1:, None]).flatten(2)
    place = place.flatten(2).clamp(max=tokens - 1)
    found = x.gather(2, place[..., None].expand(-1, -1, -1, x.shape[3]))
    return found.masked_fill(~inside[..., None], 0.0)


def in_key_order(device) -> Tensor:
    """The token of each row of a block, where keys are stored in `KEY_ORDER`: int64 `[ROWS]`."""
    sixteen = torch.tensor(KEY_ORDER, device=device)
    return (torch.arange(0, ROWS, 16, device=device)[:, None] + sixteen).flatten()


def _scale(x: Tensor, over: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    return (x.abs().amax(over) / largest).clamp(min=SMALLEST_SCALE)


def _round(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest number of the format."""
    scaled = x * scale.reciprocal()
    return scaled.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else scaled.to(dtype)
