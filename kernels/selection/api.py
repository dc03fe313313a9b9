"""The front door of block selection: validate, choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.choice import Choice

_CHOICE = Choice("select_blocks", __package__)


def select_blocks(
    scores: Tensor,
    forced: Tensor | None,
    least: int | Tensor,
    top_p: float | Tensor | None = None,
    shares: Tensor | None = None,
    *,
    above: float | Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose key blocks by score: the forced ones, then the best until every budget is met.

    A block of higher score comes first, of equal score the lower index. The same scores always give the same
    choice.

    Args:
        scores: fp32 `[B, H, Nq, Nk]`.
        forced: bool `[Nq, Nk]` on the same device, or None.
        least: key blocks to read at least, forced ones included; 1 to Nk. An int32 tensor of one element on the
            same device is read there: nothing waits, and a captured graph can be replayed with another. It is
            brought into 1 to Nk.
        top_p: read the first blocks that together reach this much of `shares`; a number or such a tensor, fp32.
        shares: fp32 like scores, the attention each key block is expected to take; `top_p` needs it.
        above: read every block of at least this score; a number or such a tensor, fp32.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        counts int32 `[B, H, Nq]` and indices int32 `[B, H, Nq, M]`, ascending up to the count; what stands
        behind the count repeats the last block and is not read. M is `least` where every row reads so many
        and the host knows it, else Nk.

    Raises:
        UsageError: shapes, types or devices do not fit together, or a budget is out of range.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    if scores.dim() != 4 or scores.dtype != torch.float32:
        raise UsageError(f"scores must be float32 [B, H, Nq, Nk], got {scores.dtype} {tuple(scores.shape)}.")
    for name, budget, dtype in (
        ("least", least, torch.int32),
        ("top_p", top_p, torch.float32),
        ("above", above, torch.float32),
    ):
        if isinstance(budget, Tensor) and (
            budget.numel() != 1 or budget.dtype != dtype or budget.device != scores.device
        ):
            raise UsageError(
                f"{name} as a tensor is one {dtype} on {scores.device}; got {budget.dtype} "
                f"{tuple(budget.shape)} on {budget.device}."
            )
    if not isinstance(least, Tensor) and not 1 <= least <= scores.shape[3]:
        raise UsageError(f"least={least} is not possible: it is 1 to {scores.shape[3]}, the key blocks.")
    if forced is not None and (forced.shape != scores.shape[2:] or forced.dtype != torch.bool):
        raise UsageError(f"forced must be bool {tuple(scores.shape[2:])}, got {tuple(forced.shape)}.")
    if (top_p is None) != (shares is None) or (shares is not None and shares.shape != scores.shape):
        raise UsageError("top_p and shares come together, and shares are shaped like scores.")
    if torch.compiler.is_compiling():
        from .op import select_blocks as select
    else:
        select = run
    return select(scores, forced, least, top_p, shares, above, impl)


def run(
    scores: Tensor,
    forced: Tensor | None,
    least: int | Tensor,
    top_p: float | Tensor | None,
    shares: Tensor | None,
    above: float | Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`select_blocks` on validated arguments."""
    match choose(scores, impl):
        case "reference":
            from .reference import select_blocks as select
        case "triton":
            from .triton import select_blocks as select
    with torch.no_grad():
        return select(scores, forced, least, top_p, shares, above)


def choose(scores: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `select_blocks` does.

    On CUDA, lists longer than the kernel takes go to the reference, which is as exact and runs there too.
    """
    return _CHOICE.choose(impl, scores.device.type == "cuda" and why_not("triton", scores) is None, scores)


def why_not(impl: str, scores: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, scores)
