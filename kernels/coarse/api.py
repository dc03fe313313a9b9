"""The front door of compensation: validate, choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.choice import Choice
from dit_accel.plan import BlockPlan

_CHOICE = Choice("add_block_means", __package__)


def add_block_means(out: Tensor, lse: Tensor, v: Tensor, plan: BlockPlan, *, impl: str = "auto") -> Tensor:
    """Mix the output of sparse attention with mean values of blocks, in place.

    With `c = plan.coarse`, row r of query block i becomes `(e^L out_r + sum_j e^(c_ij) mean(v_j)) / (e^L + sum_j
    e^(c_ij))` where L is `plan.rest` of the block or, without it, the row's lse: what was read weighs what it was
    found to weigh. Either way the weights of everything sum to one.

    Args:
        out: `[B, H, S, D]`, what `block_sparse` gave for the plan; overwritten.
        lse: `[B, H, S]`, what it gave beside it.
        v: `[B, H, S_k, D]`, its values.
        plan: has `coarse`, and no orders of its own.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        `out`.

    Raises:
        UsageError: no masses in the plan, or shapes that do not fit together.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.

    Source: `R O_s + sum_j P_j v_j` of Rectified SpaAttn, arXiv:2511.19835, where L is predicted as well.
    """
    if plan.coarse is None or plan.q_order is not None or plan.k_order is not None:
        raise UsageError("add_block_means needs a plan with coarse masses and without orders of its own.")
    wanted = (*out.shape[:2], plan.n_q, plan.n_k)
    if plan.coarse.shape != wanted or plan.coarse.dtype != torch.float32:
        raise UsageError(
            f"coarse must be float32 {wanted}, got {plan.coarse.dtype} {tuple(plan.coarse.shape)}."
        )
    fits = out.shape[2] == plan.n_q_tokens and v.shape[2] == plan.n_k_tokens and out.shape[3] == v.shape[3]
    if not fits or lse.shape != out.shape[:3]:
        raise UsageError(
            f"out {tuple(out.shape)}, lse {tuple(lse.shape)} and v {tuple(v.shape)} do not fit a plan of "
            f"{plan.n_q_tokens} query and {plan.n_k_tokens} key tokens."
        )
    if torch.compiler.is_compiling():
        from .op import add_block_means_op as add
    else:
        add = run
    ends = plan.max_q_block, plan.max_k_block
    add(out, lse, v, plan.coarse, plan.rest, plan.q_starts, plan.k_starts, *ends, impl)
    return out


def run(
    out: Tensor,
    lse: Tensor,
    v: Tensor,
    coarse: Tensor,
    rest: Tensor | None,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q_block: int,
    max_k_block: int,
    impl: str,
) -> None:
    """`add_block_means` on validated arguments."""
    from dit_accel.kernels.pooling import block_means

    match choose(out, impl):
        case "reference":
            from .reference import mix
        case "triton":
            from .triton import mix
    with torch.no_grad():
        means = block_means(v.transpose(1, 2), k_starts, max_k_block)
        total = coarse.logsumexp(-1)
        # A row without masses has no softmax, and no part in the output either.
        shares = (coarse - total[..., None].clamp(min=torch.finfo(coarse.dtype).min)).exp()
        mixed_in = shares.to(means.dtype) @ means
        mix(out, lse, total, rest, mixed_in, q_starts, max_q_block)


def choose(out: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `add_block_means` does."""
    return _CHOICE.choose(impl, out.device.type == "cuda" and out.dtype != torch.float64, out)


def why_not(impl: str, out: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, out)
