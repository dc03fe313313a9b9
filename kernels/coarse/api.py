"""The front door of compensation: validate, choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.choice import Choice
from dit_accel.plan import BlockPlan

_CHOICE = Choice("add_block_means", __package__)


def add_block_means(out: Tensor, v: Tensor, plan: BlockPlan, *, impl: str = "auto") -> Tensor:
    """Mix the output of sparse attention with mean values of blocks, in place.

    Row r of query block i becomes `(1 - sum_j w_ij) out_r + sum_j w_ij mean(v_j)` with `w = plan.coarse`. So the
    weights of everything sum to one as they did before.

    Args:
        out: `[B, H, S, D]`, what `block_sparse` gave for the plan; overwritten.
        v: `[B, H, S_k, D]`, its values.
        plan: has `coarse`, and no orders of its own.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        `out`.

    Raises:
        UsageError: no weights in the plan, or shapes that do not fit together.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.

    Source: the weights of Rectified SpaAttn, arXiv:2511.19835; with weights of all that was not read, VSA's coarse
    branch (arXiv:2505.13389) by predicted mass instead of a learned gate.
    """
    if plan.coarse is None or plan.q_order is not None or plan.k_order is not None:
        raise UsageError("add_block_means needs a plan with coarse weights and without orders of its own.")
    wanted = (*out.shape[:2], plan.n_q, plan.n_k)
    if plan.coarse.shape != wanted or plan.coarse.dtype != torch.float32:
        raise UsageError(
            f"coarse must be float32 {wanted}, got {plan.coarse.dtype} {tuple(plan.coarse.shape)}."
        )
    if out.shape[2] != plan.n_q_tokens or v.shape[2] != plan.n_k_tokens or out.shape[3] != v.shape[3]:
        raise UsageError(
            f"out {tuple(out.shape)} and v {tuple(v.shape)} do not fit a plan of {plan.n_q_tokens} query and "
            f"{plan.n_k_tokens} key tokens."
        )
    if torch.compiler.is_compiling():
        from .op import add_block_means_op as add
    else:
        add = run
    add(out, v, plan.coarse, plan.q_starts, plan.k_starts, plan.max_q_block, plan.max_k_block, impl)
    return out


def run(
    out: Tensor,
    v: Tensor,
    weights: Tensor,
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
        # A row of weights that rounds to more than one must not turn the sign of what was read.
        rest = (1 - weights.sum(-1)).clamp(min=0)
        mix(out, rest, weights.to(means.dtype) @ means, q_starts, max_q_block)


def choose(out: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `add_block_means` does."""
    return _CHOICE.choose(impl, out.device.type == "cuda" and out.dtype != torch.float64, out)


def why_not(impl: str, out: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, out)
