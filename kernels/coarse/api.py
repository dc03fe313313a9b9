"""The front door of compensation: validate, choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.choice import Choice
from dit_accel.plan import BlockPlan

_CHOICE = Choice("add_block_means", __package__)


def add_block_means(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mix the output of sparse attention with means of key blocks, in place. Weights of everything sum to one.

    With `c = plan.coarse` and `s_rj = c_ij + q_r mean(k_j) scale`, row r of query block i becomes

        (e^lse_r out_r + sum_j e^s_rj mean(v_j)) / (e^lse_r + sum_j e^s_rj)

    that is, attention goes on over the means as if each were e^c tokens. With `plan.rest` it becomes

        (e^rest_i out_r + sum_j e^c_ij mean(v_j)) / (e^rest_i + sum_j e^c_ij)

    where all masses were predicted for whole blocks, what was read included.

    Args:
        out: `[B, H, S, D]`, what `block_sparse` gave for the plan; overwritten.
        lse: `[B, H, S]`, what it gave beside it.
        q, k, v: `[B, H, S, D]`, what it was given.
        plan: has `coarse`; where it has orders of its own, its blocks' means are of tokens in those orders.
        scale: factor of the scores; None is `D ** -0.5`.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Returns:
        `out`.

    Raises:
        UsageError: no `coarse` in the plan, or shapes that do not fit together.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.

    Source: the second form is Rectified SpaAttn's `R O_s + sum_j P_j v_j` (arXiv:2511.19835). The first, ours, takes
    the mass of what was read from reading it, and each row's own scores with the means.
    """
    if plan.coarse is None:
        raise UsageError("add_block_means needs a plan with coarse weights.")
    wanted = (*out.shape[:2], plan.n_q, plan.n_k)
    if plan.coarse.shape != wanted or plan.coarse.dtype != torch.float32:
        raise UsageError(
            f"coarse must be float32 {wanted}, got {plan.coarse.dtype} {tuple(plan.coarse.shape)}."
        )
    keys = (*out.shape[:2], plan.n_k_tokens, out.shape[3])
    fits = out.shape[2] == plan.n_q_tokens and q.shape == out.shape and k.shape == v.shape == keys
    if not fits or lse.shape != out.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (out, lse, q, k, v))
        raise UsageError(
            f"out, lse, q, k, v {shapes} do not fit a plan of {plan.n_q_tokens} query and {plan.n_k_tokens} key "
            "tokens."
        )
    if torch.compiler.is_compiling():
        from .op import add_block_means_op as add
    else:
        add = run
    from dit_accel.kernels.block_sparse.api import in_order
    from dit_accel.kernels.reorder import put_rows, take_rows

    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    rest = plan.coarse, plan.rest, plan.q_starts, plan.k_starts, plan.max_q_block, plan.max_k_block, scale, impl
    q, k, v, _ = in_order(q, k, v, plan)
    if plan.q_order is None:
        add(out, lse, q, k, v, *rest)
        return out
    rows = take_rows(out, plan.q_order)
    add(rows, take_rows(lse[..., None], plan.q_order)[..., 0], q, k, v, *rest)
    return out.copy_(put_rows(rows, plan.q_order))


def run(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coarse: Tensor,
    rest: Tensor | None,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q_block: int,
    max_k_block: int,
    scale: float,
    impl: str,
) -> None:
    """`add_block_means` on validated arguments."""
    from dit_accel.kernels.pooling import block_means

    match choose(out, impl):
        case "reference":
            from . import reference as kernels
        case "triton":
            from . import triton as kernels
    with torch.no_grad():
        values = block_means(v.transpose(1, 2), k_starts, max_k_block)
        if rest is None:
            keys = block_means(k.transpose(1, 2), k_starts, max_k_block)
            kernels.attend_on(out, lse, q, keys, values, coarse, q_starts, max_q_block, scale)
            return
        total = coarse.logsumexp(-1)
        # A row without masses has no softmax, and no part in the output either.
        shares = (coarse - total[..., None].clamp(min=torch.finfo(coarse.dtype).min)).exp()
        kernels.mix(out, total - rest, shares.to(values.dtype) @ values, q_starts, max_q_block)


def choose(out: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `add_block_means` does."""
    return _CHOICE.choose(impl, out.device.type == "cuda" and out.dtype != torch.float64, out)


def why_not(impl: str, out: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, out)
