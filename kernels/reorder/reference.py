"""Reordering in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """Arguments and result as in `api.take_rows`."""
    return x.gather(2, _whole_rows(x, order)).contiguous()


def put_rows(x: Tensor, order: Tensor) -> Tensor:
    """Arguments and result as in `api.put_rows`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out.scatter_(2, _whole_rows(x, order), x)


def _whole_rows(x: Tensor, order: Tensor) -> Tensor:
    """int64 `[B, H, N, D]`, one entry a row in memory: the rest are views of it."""
    return order.long()[..., None].expand(*x.shape[:2], -1, x.shape[3])
