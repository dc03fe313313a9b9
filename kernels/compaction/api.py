"""The front door of compaction: validate, choose an implementation, run it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.choice import Choice
from dit_accel.plan import BlockPlan

_CHOICE = Choice("compact_lists", __package__)


def compact_lists(
    plan: BlockPlan, needed: Tensor, forced: Tensor | None = None, *, impl: str = "auto"
) -> BlockPlan:
    """Keep the list entries that are needed or forced, in their order.

    With `needed` of `block_sparse_feedback` this is LiteAttention's next plan (arXiv:2511.11062): lists only ever
    become shorter.

    Args:
        plan: the plan of the call that `needed` is about.
        needed: bool `[B, H, Nq, M]` beside `plan.indices`; what stands behind the counts is not looked at.
        forced: bool `[Nq, Nk]`, pairs of blocks that are kept wherever they are listed; or None.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        A plan with lists `[B, H, Nq, M]`, on the same device; nothing waits for the device. What stands behind its
        counts may be anything.

    Raises:
        UsageError: shapes, types or devices do not fit together.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    lists = plan.indices.shape
    fits = needed.dim() == 4 and needed.shape[2:] == lists[2:]
    if not fits or any(a not in (1, b) for a, b in zip(lists[:2], needed.shape[:2], strict=True)):
        raise UsageError(f"needed must be [B, H, Nq, M] for lists {tuple(lists)}, got {tuple(needed.shape)}.")
    if needed.dtype != torch.bool or needed.device != plan.device:
        raise UsageError(f"needed must be bool on {plan.device}, got {needed.dtype} on {needed.device}.")
    if forced is not None:
        wanted = (plan.n_q, plan.n_k)
        if forced.dtype != torch.bool or forced.shape != wanted or forced.device != plan.device:
            raise UsageError(
                f"forced must be bool {wanted} on {plan.device}, got {forced.dtype} {tuple(forced.shape)} on "
                f"{forced.device}."
            )
    if torch.compiler.is_compiling():
        from .op import compact_lists as compact
    else:
        compact = run
    counts, indices = compact(plan.counts, plan.indices, needed, forced, impl)
    return replace(plan, counts=counts, indices=indices)


def run(
    counts: Tensor, indices: Tensor, needed: Tensor, forced: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """`compact_lists` on validated lists."""
    match choose(counts, impl):
        case "reference":
            from .reference import compact_lists as compact
        case "triton":
            from .triton import compact_lists as compact
    return compact(counts, indices, needed, forced)


def choose(counts: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `compact_lists` does."""
    return _CHOICE.choose(impl, counts.device.type == "cuda", counts)


def why_not(impl: str, counts: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, counts)
