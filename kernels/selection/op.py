"""Block selection as one opaque node of torch.compile: `torch.ops.dit_accel.select_blocks`."""

from __future__ import annotations

import torch
from torch import Tensor

from .api import run


@torch.library.custom_op("dit_accel::select_blocks", mutates_args=())
def select_blocks_op(
    scores: Tensor,
    forced: Tensor | None,
    least: int | None,
    top_p: float | None,
    shares: Tensor | None,
    least_there: Tensor | None,
    top_p_there: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`api.run`, with budgets that are tensors as arguments of their own."""
    least = least_there if least is None else least
    return run(scores, forced, least, top_p if top_p_there is None else top_p_there, shares, impl)


@select_blocks_op.register_fake
def _shapes(scores, forced, least, top_p, shares, least_there, top_p_there, impl):
    same = top_p is None and top_p_there is None and forced is None and least is not None
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    return counts, scores.new_empty(*scores.shape[:3], least if same else scores.shape[3], dtype=torch.int32)


def select_blocks(
    scores: Tensor,
    forced: Tensor | None,
    least: int | Tensor,
    top_p: float | Tensor | None,
    shares: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`api.run` through the operator."""
    there = [x if isinstance(x, Tensor) else None for x in (least, top_p)]
    numbers = [None if isinstance(x, Tensor) else x for x in (least, top_p)]
    return select_blocks_op(scores, forced, *numbers, shares, *there, impl)
