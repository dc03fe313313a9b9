"""The front door of mean pooling: validate, choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.choice import Choice

_CHOICE = Choice("block_means", __package__)


def block_means(x: Tensor, starts: Tensor, max_block: int, *, impl: str = "auto") -> Tensor:
    """Average the tokens of each block, in fp32 also for low-precision input; a block without tokens gives 0.

    Sums run in a fixed order without atomics, so equal input gives equal means.

    Args:
        x: `[B, S, H, D]`, any floating dtype, any strides.
        starts: int32 `[B|1, H|1, N + 1]`, token offsets of the blocks, on x's device.
        max_block: no block is longer.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        `[B, H, N, D]`, float32 (float64 for float64 input).

    Raises:
        UsageError: shapes, types or devices do not fit together.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise UsageError(f"x must be floating [B, S, H, D], got {x.dtype} {tuple(x.shape)}.")
    if starts.dim() != 3 or starts.dtype != torch.int32 or starts.device != x.device:
        raise UsageError(
            f"starts must be int32 [B|1, H|1, N + 1] on {x.device}, got {starts.dtype} {tuple(starts.shape)} "
            f"on {starts.device}."
        )
    if starts.shape[0] not in (1, x.shape[0]) or starts.shape[1] not in (1, x.shape[2]):
        raise UsageError(
            f"starts {tuple(starts.shape)} must have x's batch and heads {tuple(x.shape)}, or 1."
        )
    if torch.compiler.is_compiling():
        from .op import block_means as pool
    else:
        pool = run
    return pool(x, starts, max_block, impl)


def run(x: Tensor, starts: Tensor, max_block: int, impl: str) -> Tensor:
    """`block_means` on validated arguments."""
    match choose(x, impl):
        case "reference":
            from .reference import block_means as pool
        case "triton":
            from .triton import block_means as pool
    with torch.no_grad():
        return pool(x, starts, max_block)


def choose(x: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `block_means` does."""
    return _CHOICE.choose(impl, x.device.type == "cuda" and x.dtype != torch.float64, x)


def why_not(impl: str, x: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, x)
