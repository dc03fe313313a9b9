"""Mean pooling as one opaque node of torch.compile: `torch.ops.dit_accel.block_means`."""

from __future__ import annotations

import torch
from torch import Tensor

from .api import run


@torch.library.custom_op("dit_accel::block_means", mutates_args=())
def block_means(
    x: Tensor, starts: Tensor, max_block: int, impl: str, of: str = "values", center: Tensor | None = None
) -> Tensor:
    """As `api.run`."""
    return run(x, starts, max_block, impl, of, center).contiguous()  # as `_shape` promises


@block_means.register_fake
def _shape(x, starts, max_block, impl, of="values", center=None):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], x.shape[2], starts.shape[2] - 1, x.shape[3], dtype=dtype)
