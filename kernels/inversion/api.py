"""The front door of inversion: choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.choice import Choice
from dit_accel.plan import BlockPlan

from .inverse import Inverse, bounds

_CHOICE = Choice("invert_plan", __package__)


def invert_plan(plan: BlockPlan, *, impl: str = "auto") -> Inverse:
    """Which query blocks read each key block; nothing waits for the device.

    Args:
        plan: any; what stands behind its counts is not looked at.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        counts, lists and work items on the plan's device, for the batch rows and heads that its lists tell apart. What
        stands behind the counts may be anything. Lists take `4 Nk Nq` bytes a head, as a plan's own do.

    Raises:
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    if torch.compiler.is_compiling():
        from .op import invert_lists as invert
    else:
        invert = run
    counts, lists, items = invert(plan.counts, plan.indices, plan.n_k, impl)
    return Inverse(counts, lists, items, bounds(plan.n_q, plan.n_k)[1])


def run(counts: Tensor, indices: Tensor, n_k: int, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """`invert_plan` on a plan's tensors: counts, lists and items."""
    match choose(counts, impl):
        case "reference":
            from .reference import invert_lists as invert
        case "triton":
            from .triton import invert_lists as invert
    return invert(counts, indices, n_k)


def choose(counts: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `invert_plan` does."""
    return _CHOICE.choose(impl, counts.device.type == "cuda", counts)


def why_not(impl: str, counts: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, counts)
