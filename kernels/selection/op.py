"""Block selection as one opaque node of torch.compile: `torch.ops.dit_accel.select_blocks`."""

from __future__ import annotations

import torch
from torch import Tensor

from .api import run


@torch.library.custom_op("dit_accel::select_blocks", mutates_args=())
def select_blocks(
    scores: Tensor, forced: Tensor | None, least: int, top_p: float | None, shares: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """As `api.select_blocks`, without its checks."""
    return run(scores, forced, least, top_p, shares, impl)


@select_blocks.register_fake
def _shapes(scores, forced, least, top_p, shares, impl):
    width = least if top_p is None and forced is None else scores.shape[3]
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    return counts, scores.new_empty(*scores.shape[:3], width, dtype=torch.int32)
