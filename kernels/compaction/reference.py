"""Compaction in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_lists(
    counts: Tensor, indices: Tensor, needed: Tensor, forced: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The shortened counts and lists; arguments as in `api.compact_lists`."""
    slot = torch.arange(indices.shape[3], device=indices.device)
    listed = slot < counts[..., None]
    if forced is not None:
        # What stands behind a count may be anything.
        needed = needed | forced[None, None].expand(*indices.shape[:2], -1, -1).gather(
            3, indices.long().where(listed, 0)
        )
    kept = needed & listed
    order = torch.where(kept, slot, slot + len(slot)).argsort(-1)
    lists = indices.expand(kept.shape).gather(3, order)
    return kept.sum(-1, dtype=torch.int32), lists
