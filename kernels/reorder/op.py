"""Reordering as opaque nodes of torch.compile: `torch.ops.dit_accel.take_rows` and `put_rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from .api import run_put, run_take


@torch.library.custom_op("dit_accel::take_rows", mutates_args=())
def take_rows(x: Tensor, order: Tensor, impl: str) -> Tensor:
    """As `api.take_rows`, without its checks."""
    return run_take(x, order, impl)


@take_rows.register_fake
def _taken(x, order, impl):
    return x.new_empty(*x.shape[:2], order.shape[2], x.shape[3])


@torch.library.custom_op("dit_accel::put_rows", mutates_args=())
def put_rows(x: Tensor, order: Tensor, impl: str) -> Tensor:
    """As `api.put_rows`, without its checks."""
    return run_put(x, order, impl)


@put_rows.register_fake
def _put(x, order, impl):
    return x.new_empty(x.shape)
