"""The front door of counting: choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import KernelUnavailable, unknown_name
from dit_accel.plan import BlockPlan

IMPLEMENTATIONS = ("reference", "triton")


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
    if impl == "auto":
        impl = "triton" if plan.device.type == "cuda" else "reference"
    reason = why_not(impl, plan)
    if reason is not None:
        raise KernelUnavailable(f"count_pairs impl={impl!r} cannot run this call: {reason}")
    return impl


def why_not(impl: str, plan: BlockPlan) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    if impl not in IMPLEMENTATIONS:
        raise unknown_name("count_pairs implementation", impl, (*IMPLEMENTATIONS, "auto"))
    if impl == "reference":
        return None
    try:
        from . import triton as implementation
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with `pip install triton`."
    return implementation.why_not(plan)
