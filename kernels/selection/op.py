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
    above: float | None,
    above_there: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`api.run`, with budgets that are tensors as arguments of their own."""
    least = least_there if least is None else least
    top_p = top_p if top_p_there is None else top_p_there
    return run(scores, forced, least, top_p, shares, above if above_there is None else above_there, impl)


@select_blocks_op.register_fake
def _shapes(scores, forced, least, top_p, shares, least_there, top_p_there, above, above_there, impl):
    budgets = (forced, top_p, top_p_there, above, above_there)
    same = least is not None and all(x is None for x in budgets)
    counts = scores.new_empty(scores.shape[:3], dtype=torch.int32)
    return counts, scores.new_empty(*scores.shape[:3], least if same else scores.shape[3], dtype=torch.int32)


def select_blocks(
    scores: Tensor,
    forced: Tensor | None,
    least: int | Tensor,
    top_p: float | Tensor | None,
    shares: Tensor | None,
    above: float | Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`api.run` through the operator."""
    there = [x if isinstance(x, Tensor) else None for x in (least, top_p, above)]
    numbers = [None if isinstance(x, Tensor) else x for x in (least, top_p, above)]
    return select_blocks_op(scores, forced, *numbers[:2], shares, *there[:2], numbers[2], there[2], impl)
