"""The front door of linear attention: validate, choose an implementation, run it."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from dit_accel.errors import UsageError, unknown_name
from dit_accel.kernels.choice import Choice
from dit_accel.plan import BlockPlan, uniform_starts

from .passes import Blocks, attend, gradients

FEATURES = ("softmax", "elu", "relu")
WORKSPACE = 2**28  # bytes, 256 MiB
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Tokens of a part of a sum over all keys: few parts, and enough of them to keep a chip busy.
_PART = 1024

_CHOICE = Choice("linear_attention", __package__)

Layout = Literal["bshd", "bhsd"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | None = None,
    *,
    feature: str = "softmax",
    skipped: Tensor | None = None,
    eps: float = 1e-5,
    projection: tuple[Tensor, Tensor | None] | None = None,
    into: Tensor | None = None,
    layout: Layout = "bhsd",
    impl: str = "auto",
    workspace: int = WORKSPACE,
) -> Tensor:
    """Linear attention of every query to the keys that a plan leaves unread, or to all keys.

    With the feature map phi, row r of query block i becomes

        phi(q_r) H_i / (eps + phi(q_r) . z_i),   H_i = sum_j phi(K_j)^T V_j,   z_i = sum_j sum phi(K_j)

    where j runs over the key blocks that the plan does not list for i and `skipped` does not name or, without a plan,
    over all. A row with no such block, or whose divisor is 0, gives 0. Differentiable (once) in q, k and v.

    Sums are float32 (float64 for float64 input). 16-bit inputs are multiplied as bfloat16, and the states H are kept as
    such: the range of float16 is too small for sums over all tokens. Sums have a fixed order and no atomics.

    Args:
        q: `[B, H, S, D]` (layout "bhsd") or `[B, S, H, D]` ("bshd"); float32, float16 or bfloat16, and float64 for
            "reference"; any strides.
        k, v: the same with their own S.
        plan: covers exactly the tokens of q and of k; its batch and head sizes are those of q or 1; it has no orders
            of its own. None: all keys, as published.
        feature: phi: "softmax" over D, "elu" (elu(x) + 1) or "relu".
        skipped: bool `[B|1, H|1, Nq, Nk]`, key blocks that count neither as read nor here; only with a plan.
        eps: at least 0; 1e-5 as published.
        projection: `(weight, bias)`, `[D, D]` and `[D]` as of `nn.Linear`, or `[H, D, D]` and `[H, D]` of each head;
            the bias may be None. `out @ weight.T + bias` comes back instead; so a row that would be 0 gives the bias.
            No gradients. The weight multiplies the states where they, as D rows each, are fewer than the rows.
        into: as q; the result is added to it, rounded once, and it comes back. No gradients.
        layout: the order of the dimensions of q, k, v, into and out.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.
        workspace: bytes that the states may take, forward and backward ("reference" also copies q, k and v to blocks).
            Heads that do not fit together are worked on in turns.

    Returns:
        Shaped and typed like q.

    Raises:
        UsageError: shapes, types, devices or the plan do not fit together, a plan has orders, eps is below 0, a
            gradient is asked of projection or into, or one head's states exceed the workspace.
        UnknownNameError: no such implementation, feature or layout.
        KernelUnavailable: the named implementation cannot run this call.

    Source: SLA, arXiv:2509.24006: the branch of unread blocks ("complement") and, in its later code, of all keys.
    """
    if layout not in ("bshd", "bhsd"):
        raise unknown_name("layout", layout, ("bshd", "bhsd"))
    if feature not in FEATURES:
        raise unknown_name("feature", feature, FEATURES)
    if layout == "bshd":
        q, k, v, into = (x.transpose(1, 2) if x is not None and x.dim() == 4 else x for x in (q, k, v, into))
    _validate(q, k, v, into, eps)
    blocks = _blocks(q, k, plan, skipped)
    weight, bias = _checked_projection(q, projection)
    options = feature, float(eps), int(workspace), impl
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, weight, bias, into)
    )
    if differentiable and (projection is not None or into is not None):
        raise UsageError(
            "linear_attention has no gradients with projection= or into=; apply the projection and add outside, or "
            "call it under torch.no_grad()."
        )
    if torch.compiler.is_compiling():
        from .op import linear_attention as attend_now

        out = attend_now(q, k, v, blocks, *options, weight, bias, into)
    elif differentiable:
        from .gradient import LinearAttention

        out = LinearAttention.apply(q, k, v, blocks, *options)
    else:
        out = run(q, k, v, blocks, *options, weight, bias, into)
    return out.transpose(1, 2) if layout == "bshd" else out


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    feature: str,
    eps: float,
    workspace: int,
    impl: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """`linear_attention` on validated `[B, H, S, D]`, without gradients; weight `[H|1, D, D]`, bias `[H|1, D]`."""
    with torch.no_grad():
        return attend(_steps(q, impl), q, k, v, blocks, feature, eps, workspace, weight, bias, into)


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    blocks: Blocks,
    feature: str,
    eps: float,
    workspace: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of what `run` gave without a projection."""
    with torch.no_grad():
        return gradients(_steps(q, impl), q, k, v, grad, blocks, feature, eps, workspace)


def choose(q: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `linear_attention` does. q: `[B, H, S, D]`."""
    return _CHOICE.choose(impl, q.device.type == "cuda" and q.dtype != torch.float64, q)


def why_not(impl: str, q: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can. q: `[B, H, S, D]`."""
    return _CHOICE.why_not(impl, q)


def bytes_of_all_keys(q: Tensor, impl: str = "auto") -> int:
    """At most so many bytes a call without a plan, gradients or `into` takes for a while beside its result.

    Args:
        q: `[B, H, S, D]`, k and v being like it.
    """
    batch, heads, tokens, dim = q.shape
    wide = 8 if q.dtype == torch.float64 else 4
    parts = -(-tokens // _PART)
    taken = min(WORKSPACE, batch * heads * (parts + 3) * dim * (dim + 1) * wide)
    if choose(q, impl) == "reference":
        # keys, values and features in whole parts of a wider type, or queries and what comes out: four at a time, and
        # half of one where a narrow type is brought to a wide one
        copies = 4 if q.element_size() == wide else 4.5
        taken += int(copies * batch * heads * parts * min(_PART, tokens) * dim * wide)
    return taken


def _steps(q: Tensor, impl: str) -> ModuleType:
    match choose(q, impl):
        case "reference":
            from . import reference as steps
        case "triton":
            from . import triton as steps
    return steps


def _blocks(q: Tensor, k: Tensor, plan: BlockPlan | None, skipped: Tensor | None) -> Blocks:
    if plan is None:
        if skipped is not None:
            raise UsageError("skipped= names blocks of a plan; give the plan too, or leave both out.")
        starts = (uniform_starts(x.shape[2], _PART, x.device) for x in (q, k))
        return Blocks(None, *starts, *(min(_PART, x.shape[2]) for x in (q, k)))
    if plan.q_order is not None or plan.k_order is not None:
        raise UsageError(
            "linear_attention takes no plan with orders of its own; bring q, k and v into their order first "
            "(kernels.reorder)."
        )
    if plan.device != q.device:
        raise UsageError(f"The plan is on {plan.device}, q on {q.device}; build the plan where q is.")
    for axis, what in enumerate(("batch", "head")):
        if plan.lead[axis] not in (1, q.shape[axis]):
            raise UsageError(
                f"The plan's {what} size is {plan.lead[axis]}; q's is {q.shape[axis]}. Use that or 1."
            )
    for side, tokens, x in (("query", plan.n_q_tokens, q), ("key", plan.n_k_tokens, k)):
        if tokens != x.shape[2]:
            raise UsageError(f"The plan covers {tokens} {side} tokens, but there are {x.shape[2]}.")
    unread = ~plan.to_mask()
    if skipped is not None:
        lead = all(n in (1, m) for n, m in zip(skipped.shape[:2], q.shape[:2], strict=False))
        if skipped.dtype != torch.bool or skipped.shape[2:] != unread.shape[2:] or not lead:
            raise UsageError(
                f"skipped must be bool [{q.shape[0]}|1, {q.shape[1]}|1, {plan.n_q}, {plan.n_k}], got {skipped.dtype} "
                f"{tuple(skipped.shape)}."
            )
        unread = unread & ~skipped
    return Blocks(unread, plan.q_starts, plan.k_starts, plan.max_q_block, plan.max_k_block)


def _checked_projection(
    q: Tensor, projection: tuple[Tensor, Tensor | None] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weight `[H|1, D, D]` and bias `[H|1, D]`."""
    if projection is None:
        return None, None
    heads, dim = q.shape[1], q.shape[3]
    weight, bias = projection
    for name, x, end in (("weight", weight, (dim, dim)), ("bias", bias, (dim,))):
        if x is not None and (x.shape not in (end, (heads, *end)) or x.device != q.device):
            raise UsageError(
                f"The projection's {name} must be {end} or {(heads, *end)} on {q.device}, got {tuple(x.shape)} on "
                f"{x.device}."
            )
    shared = bias is not None and bias.dim() == 1
    return weight if weight.dim() == 3 else weight[None], bias[None] if shared else bias


def _validate(q: Tensor, k: Tensor, v: Tensor, into: Tensor | None, eps: float) -> None:
    """Raise UsageError unless q, k, v (`[B, H, S, D]`) and eps describe one call."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or 0 in x.shape:
            raise UsageError(f"{name} must have 4 dimensions, none of them 0, got shape {tuple(x.shape)}.")
        if x.dtype != q.dtype or x.device != q.device or x.dtype not in FLOATS:
            raise UsageError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; make them alike, and one of "
                f"{', '.join(str(d).removeprefix('torch.') for d in FLOATS)}."
            )
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise UsageError(
            "q, k and v must agree in batch, heads and head size, and k and v in everything; got [B, H, S, D] = "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if into is not None and (into.shape != q.shape or into.dtype != q.dtype or into.device != q.device):
        raise UsageError(
            f"into must be as q, {q.dtype} {tuple(q.shape)} on {q.device}; got {into.dtype} {tuple(into.shape)} on "
            f"{into.device}."
        )
    if not eps >= 0:
        raise UsageError(f"eps={eps} must be at least 0.")
