"""The front door of reordering: validate, choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.choice import Choice

_CHOICE = Choice("take_rows and put_rows", __package__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def take_rows(x: Tensor, order: Tensor, *, impl: str = "auto") -> Tensor:
    """Row `order[i]` of x at place i: `out[b, h, i] = x[b, h, order[b, h, i]]`, bit for bit.

    Args:
        x: `[B, H, S, D]`, float32, float16, bfloat16 or float64, any strides.
        order: int32 `[B|1, H|1, N]`, 0 to S - 1, on x's device. The numbers are not looked at beforehand: a wrong one
            is an error on the CPU and reads foreign memory on a GPU.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        `[B, H, N, D]`, contiguous, in x's dtype.

    Raises:
        UsageError: shapes, types or devices do not fit together, or x needs a gradient.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    _validate(x, order)
    if torch.compiler.is_compiling():
        from .op import take_rows as take
    else:
        take = run_take
    return take(x, order, impl)


def put_rows(x: Tensor, order: Tensor, *, impl: str = "auto") -> Tensor:
    """Row i of x at place `order[i]`: `out[b, h, order[b, h, i]] = x[b, h, i]`, the inverse of `take_rows`.

    Numbers of one value a token go with a last dimension of 1: `put_rows(lse[..., None], order)[..., 0]`.

    Args:
        x: `[B, H, N, D]`, as in `take_rows`.
        order: int32 `[B|1, H|1, N]`, a permutation of 0 to N - 1. A place that it leaves out is not written.
        impl: as in `take_rows`.

    Returns:
        `[B, H, N, D]`, contiguous, in x's dtype.

    Raises:
        UsageError, UnknownNameError, KernelUnavailable: as `take_rows`.
    """
    _validate(x, order)
    if order.shape[2] != x.shape[2]:
        raise UsageError(
            f"put_rows needs one place for each of x's {x.shape[2]} rows, but order names {order.shape[2]}."
        )
    if torch.compiler.is_compiling():
        from .op import put_rows as put
    else:
        put = run_put
    return put(x, order, impl)


def run_take(x: Tensor, order: Tensor, impl: str) -> Tensor:
    """`take_rows` on validated arguments."""
    match choose(x, impl):
        case "reference":
            from .reference import take_rows as take
        case "triton":
            from .triton import take_rows as take
    with torch.no_grad():
        return take(x, order)


def run_put(x: Tensor, order: Tensor, impl: str) -> Tensor:
    """`put_rows` on validated arguments."""
    match choose(x, impl):
        case "reference":
            from .reference import put_rows as put
        case "triton":
            from .triton import put_rows as put
    with torch.no_grad():
        return put(x, order)


def choose(x: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `take_rows` does."""
    return _CHOICE.choose(impl, x.device.type == "cuda" and why_not("triton", x) is None, x)


def why_not(impl: str, x: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, x)


def _validate(x: Tensor, order: Tensor) -> None:
    if x.dim() != 4 or x.dtype not in _DTYPES:
        raise UsageError(
            f"x must be [B, H, S, D] in float32, float16, bfloat16 or float64, got {x.dtype} {tuple(x.shape)}."
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise UsageError("x requires a gradient, and reordering has none: call it under torch.no_grad().")
    if order.dim() != 3 or order.dtype != torch.int32 or order.device != x.device:
        raise UsageError(
            f"order must be int32 [B|1, H|1, N] on {x.device}, got {order.dtype} {tuple(order.shape)} on "
            f"{order.device}."
        )
    if any(given not in (1, own) for given, own in zip(order.shape[:2], x.shape[:2], strict=True)):
        raise UsageError(
            f"order {tuple(order.shape)} must have x's batch and heads {tuple(x.shape[:2])}, or 1."
        )
