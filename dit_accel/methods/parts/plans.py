"""Plans: put chosen blocks and a layout together."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.plan import BlockPlan


def plan_of(
    counts: Tensor, indices: Tensor, layout: TokenLayout, key_means: Tensor | None = None
) -> BlockPlan:
    """The plan that reads `indices` up to `counts`, with the layout's blocks on both sides.

    key_means: fp32 `[B, H, N, D]`, where the method took them: quantised attention then need not.
    """
    starts = layout.starts.to(counts.device)
    return BlockPlan(
        counts=counts,
        indices=indices,
        q_starts=starts,
        k_starts=starts,
        n_q_tokens=layout.n_tokens,
        n_k_tokens=layout.n_tokens,
        max_q_block=layout.max_block,
        max_k_block=layout.max_block,
        even_k=layout.even,
        even_q=layout.even,
        key_means=key_means,
        longest_first=layout.text_first,
    )


def full_plan(layout: TokenLayout, device: torch.device) -> BlockPlan:
    """The plan that reads every block, for all batch rows and heads."""
    n = layout.n_blocks
    counts = torch.full((1, 1, n), n, dtype=torch.int32, device=device)
    indices = torch.arange(n, dtype=torch.int32, device=device).repeat(1, 1, n, 1)
    return plan_of(counts, indices, layout)
