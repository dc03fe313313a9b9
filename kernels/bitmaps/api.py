"""The front door of bitmaps: validate, choose an implementation, run it.

A plan's lists take four bytes an entry and are as wide as the row: 56 MB for a layer of Wan 14B at 720p. What is kept
from step to step, for each layer and branch, is a bitmap: 1.8 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.choice import Choice
from dit_accel.plan import BlockPlan

_CHOICE = Choice("bitmaps", __package__)
BITS = 32


def pack_lists(plan: BlockPlan, *, impl: str = "auto") -> Tensor:
    """The plan's lists as bitmaps.

    Args:
        plan: any; what stands behind its counts is not looked at.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        int32 `[B|1, H|1, Nq, ceil(Nk / 32)]`; bit b of word w is key block 32 w + b.

    Raises:
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    return run_pack(plan.counts, plan.indices, plan.n_k, impl)


def unpack_lists(bits: Tensor, n_k: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The lists that a bitmap stands for.

    Args:
        bits: int32 `[B, H, Nq, ceil(n_k / 32)]`, of `pack_lists`.
        n_k: key blocks.
        impl: as in `pack_lists`.

    Returns:
        counts int32 `[B, H, Nq]` and indices int32 `[B, H, Nq, n_k]`, ascending up to the count; what stands behind
        may be anything.

    Raises:
        UsageError: a bitmap of another type or width.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    words = -(-n_k // BITS)
    if bits.dim() != 4 or bits.dtype != torch.int32 or bits.shape[3] != words:
        raise UsageError(
            f"bits must be int32 [B, H, Nq, {words}] for {n_k} key blocks, got {bits.dtype} {tuple(bits.shape)}."
        )
    return run_unpack(bits, n_k, impl)


def run_pack(counts: Tensor, indices: Tensor, n_k: int, impl: str) -> Tensor:
    """`pack_lists` on a plan's tensors."""
    match choose(counts, impl):
        case "reference":
            from .reference import pack_lists as pack
        case "triton":
            from .triton import pack_lists as pack
    return pack(counts, indices, n_k)


def run_unpack(bits: Tensor, n_k: int, impl: str) -> tuple[Tensor, Tensor]:
    """`unpack_lists` on a checked bitmap."""
    match choose(bits, impl):
        case "reference":
            from .reference import unpack_lists as unpack
        case "triton":
            from .triton import unpack_lists as unpack
    return unpack(bits, n_k)


def choose(x: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `pack_lists` does."""
    return _CHOICE.choose(impl, x.device.type == "cuda", x)


def why_not(impl: str, x: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, x)
