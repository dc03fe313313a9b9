"""The front door of counting: choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.choice import Choice
from dit_accel.plan import BlockPlan

_CHOICE = Choice("count_pairs", __package__)


def count_pairs(plan: BlockPlan, *, impl: str = "auto") -> Tensor:
    """Count the pairs of a query token and a key token that a plan reads.

    Over `plan.n_pairs` this is the achieved keep. Counted in integers, so that the order of adding does not matter.

    Args:
        plan: any plan; a leading dimension of 1 counts once.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        0-d int64 tensor on the plan's device; nothing waits for the device.

    Raises:
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    if torch.compiler.is_compiling():
        from .op import count_pairs as count
    else:
        count = run
    return count(plan, impl)


def run(plan: BlockPlan, impl: str) -> Tensor:
    """`count_pairs` without the compiler in between."""
    match choose(plan, impl):
        case "reference":
            from .reference import count_pairs as count
        case "triton":
            from .triton import count_pairs as count
    return count(plan)


def choose(plan: BlockPlan, impl: str = "auto") -> str:
    """The implementation that will run; raises as `count_pairs` does."""
    return _CHOICE.choose(impl, plan.device.type == "cuda", plan)


def why_not(impl: str, plan: BlockPlan) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, plan)
