"""Compensation as one opaque node of torch.compile: `torch.ops.dit_accel.add_block_means`."""

from __future__ import annotations

import torch
from torch import Tensor

from .api import run


@torch.library.custom_op("dit_accel::add_block_means", mutates_args=("out",))
def add_block_means_op(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coarse: Tensor,
    rest: Tensor | None,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q_block: int,
    max_k_block: int,
    scale: float,
    impl: str,
) -> None:
    """As `api.run`."""
    run(out, lse, q, k, v, coarse, rest, q_starts, k_starts, max_q_block, max_k_block, scale, impl)
