"""Counting in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan


def count_pairs(plan: BlockPlan) -> Tensor:
    """Arguments and result as in `api.count_pairs`."""
    lead = plan.lead
    q_sizes, k_sizes = (
        starts.diff(dim=-1).long().expand(*lead, -1) for starts in (plan.q_starts, plan.k_starts)
    )
    slot = torch.arange(plan.indices.shape[3], device=plan.device)
    listed = (slot < plan.counts[..., None]).expand(*lead, -1, -1)
    # What stands behind a count may be anything.
    indices = plan.indices.long().expand(*lead, -1, -1).where(listed, 0)
    read = k_sizes[:, :, None].expand(-1, -1, plan.n_q, -1).gather(3, indices) * listed
    return (read.sum(-1) * q_sizes).sum()
