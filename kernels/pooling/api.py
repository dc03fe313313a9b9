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
        starts: int32 `[B|1, H|1, N + 1]`, token offsets of the blocks, on x's device; from 0 to S.
        max_block: no block is longer.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        `[B, H, N, D]`, float32 (float64 for float64 input).

    Raises:
        UsageError: shapes, types or devices do not fit together.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    return _pool(x, starts, max_block, impl, "values", None)


def block_deviations(
    x: Tensor, starts: Tensor, max_block: int, means: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Average how far the tokens of each block are from its mean, number by number: mean of `|x - mean|`.

    Args:
        means: `[B, H, N, D]`, of `block_means`. The other arguments, the result's shape and the errors as there.
    """
    wanted = (x.shape[0], x.shape[2], starts.shape[2] - 1, x.shape[3])
    if means.shape != wanted:
        raise UsageError(f"means must be {wanted} for x {tuple(x.shape)}, got {tuple(means.shape)}.")
    return _pool(x, starts, max_block, impl, "deviations", means)


def block_directions(
    x: Tensor, starts: Tensor, max_block: int, center: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Average the tokens of each block, each at length 1. A token of length 0 counts as 0.

    The squared length of the result is the mean cosine of all pairs of the block's tokens, each with itself included.

    Args:
        center: `[B, H, 1, D]`, taken from every token first; or None. The other arguments, the result's shape and the
            errors as in `block_means`.
    """
    if center is not None and center.shape != (x.shape[0], x.shape[2], 1, x.shape[3]):
        raise UsageError(f"center must be [B, H, 1, D] for x {tuple(x.shape)}, got {tuple(center.shape)}.")
    return _pool(x, starts, max_block, impl, "directions", center)


def _pool(x: Tensor, starts: Tensor, max_block: int, impl: str, of: str, center: Tensor | None) -> Tensor:
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
    return pool(x, starts, max_block, impl, of, center)


def run(
    x: Tensor, starts: Tensor, max_block: int, impl: str, of: str = "values", center: Tensor | None = None
) -> Tensor:
    """Means `of` "values", "deviations" from or "directions" around `center`, on validated arguments."""
    match choose(x, impl):
        case "reference":
            from .reference import block_means as pool
        case "triton":
            from .triton import block_means as pool
    with torch.no_grad():
        return pool(x, starts, max_block, of, center)


def choose(x: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `block_means` does."""
    return _CHOICE.choose(impl, x.device.type == "cuda" and x.dtype != torch.float64, x)


def why_not(impl: str, x: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, x)
