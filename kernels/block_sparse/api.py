"""The front door of block-sparse attention: validate, choose an implementation, run it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dit_accel.errors import KernelUnavailable, UsageError, unknown_name
from dit_accel.kernels.quantize import MODES, ROWS, quantize_blocks
from dit_accel.plan import BlockPlan

from .feedback import Feedback

if TYPE_CHECKING:  # it needs Triton
    from .triton import Config

IMPLEMENTATIONS = ("reference", "cpu", "triton", "hopper", "flash4", "flex")
PRECISIONS = ("full", *MODES)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Layout = Literal["bshd", "bhsd"]


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    layout: Layout = "bshd",
    impl: str = "auto",
    precision: str = "full",
    config: Config | None = None,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which each query block reads only the key blocks its plan lists.

    A query block with an empty list gives 0, with lse -inf. There is no backward: inputs that need a gradient are
    refused, not silently detached; `block_sparse_trainable` has one.

    Args:
        q: `[B, S, H, D]` (layout "bshd") or `[B, H, S, D]` ("bhsd"); float32, float16 or bfloat16, and float64
            for "reference" and "cpu"; any strides, no copy is made on a GPU.
        k, v: the same with their own S.
        plan: covers exactly the tokens of q and of k; its batch and head sizes are those of q or 1. Orders of its own
            are applied here and undone; its `coarse` weights are for `kernels.coarse`, not read here.
        scale: factor of the scores; None is `D ** -0.5`.
        layout: the order of the dimensions of q, k, v and out.
        impl: one of `IMPLEMENTATIONS`, or "auto" (`choose`). A named one runs or raises.
        precision: "full", or a mode of `kernels.quantize`: q, k and v are quantised first. "int8_fp8" costs a relative
            error of about 0.04, "fp8" 0.06, "int8" 0.01 on normal inputs. They run on "hopper" and, slowly,
            "reference"; "int8" on "triton" too.
        config: of the Triton kernel, as `tuning.tune` finds it; for impl "triton", not under torch.compile.
        pv_threshold: powers of two, at most 0; leave out tiles below it (next paragraph). On "reference", "cpu" and
            "triton", precision "full" and "int8". None leaves out nothing.

    `pv_threshold` is the second stage of SpargeAttn (arXiv:2502.18137; the published kernel has its sign reversed).
    Lists are visited last to first. A tile of scores is left out if in none of its rows a score comes above
    `m + pv_threshold`, where m is the row's largest score in the tiles visited before and scores are in powers of two
    (times `scale log2 e`): its exponentials and its product with v are not taken, and neither out nor lse counts it.
    "reference" and "cpu" take a whole query block and a whole list entry for a tile, so they leave out what
    `block_sparse_feedback` calls not needed. The tiles of "triton" are its configuration's, parts of those: it leaves
    out all that the others do, and perhaps more. Everywhere a token that is left out has, in every row, at most
    `2 ** pv_threshold` of the row's largest weight.

    Returns:
        `out`, shaped and typed like q, and `lse [B, H, S]`: natural log of the sum of exponentials, float32
        (float64 for float64 inputs).

    Raises:
        UsageError: shapes, types, devices or the plan do not fit together, an input needs a gradient, or a
            pv_threshold is above 0.
        UnknownNameError: no such implementation, layout or precision.
        KernelUnavailable: the named implementation cannot run this call.
    """
    q, k, v, scale = _prepare(q, k, v, plan, scale, layout, precision)
    if config is not None and (impl != "triton" or torch.compiler.is_compiling()):
        raise UsageError(f"config= is for impl='triton' outside of torch.compile, not for impl={impl!r}.")
    if pv_threshold is not None:
        pv_threshold = _checked("pv_threshold", pv_threshold)
    if torch.compiler.is_compiling():
        from .op import block_sparse as attend
    else:
        attend = partial(run, config=config)
    out, lse = attend(*in_order(q, k, v, plan), scale, impl, precision, pv_threshold=pv_threshold)
    out, lse = as_they_came(out, lse, plan)
    return (out.transpose(1, 2) if layout == "bshd" else out), lse


def block_sparse_feedback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    threshold: float,
    *,
    scale: float | None = None,
    layout: Layout = "bshd",
    impl: str = "auto",
    precision: str = "full",
) -> tuple[Tensor, Tensor, Tensor]:
    """As `block_sparse`, and which entries of the plan's lists mattered: LiteAttention's verdict (arXiv:2511.11062).

    Lists are visited last to first. An entry matters if in any row of the query block its largest score comes above
    `m + threshold`, where m is the row's largest score in the entries visited before and scores are in powers of two
    (times `scale log2 e`). The entry visited first matters always, if the query block has a row. The verdict is about
    the next call: here every listed entry is read. `compaction.compact_lists` makes the next plan of it.

    Args:
        threshold: powers of two, at most 0; -10 keeps all that is worth a thousandth of a row's largest weight.

    Modes with 8-bit values round m up to a whole power of two and lower the threshold by one: they call an entry
    needed that the formula would not, never the other way round but for their scores' own error.

    Returns:
        `out` and `lse` as `block_sparse`, and `needed`, bool `[B, H, Nq, M]` beside the plan's `indices`; false behind
        the counts.

    Raises:
        UsageError: also for a threshold above 0.
        KernelUnavailable: also where the implementation gives no verdict.
    """
    q, k, v, scale = _prepare(q, k, v, plan, scale, layout, precision)
    threshold = _checked("threshold", threshold)
    if torch.compiler.is_compiling():
        from .op import block_sparse_feedback as attend
    else:
        attend = run_feedback
    out, lse, needed = attend(*in_order(q, k, v, plan), scale, impl, precision, threshold)
    out, lse = as_they_came(out, lse, plan)
    return (out.transpose(1, 2) if layout == "bshd" else out), lse, needed


def _checked(name: str, threshold: float) -> float:
    if not threshold <= 0:
        raise UsageError(f"{name}={threshold} must be at most 0: powers of two relative to the maximum.")
    return float(threshold)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None, layout: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, float]:
    """`validate`, and what holds only without a backward."""
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                f"{name} requires a gradient, and block_sparse has none: call block_sparse_trainable, or this under "
                "torch.no_grad()."
            )
    return validate(q, k, v, plan, scale, layout)


def validate(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float | None, layout: str
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Check what can be checked before choosing; q, k, v as `[B, H, S, D]` and the scale as a number."""
    if layout not in ("bshd", "bhsd"):
        raise unknown_name("layout", layout, ("bshd", "bhsd"))
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) if x.dim() == 4 else x for x in (q, k, v))
    _validate(q, k, v, plan)
    return q, k, v, q.shape[-1] ** -0.5 if scale is None else float(scale)


def in_order(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor, BlockPlan]:
    """Bring tokens into the orders that the plan's blocks count, and say so in the plan."""
    if plan.q_order is None and plan.k_order is None:
        return q, k, v, plan
    from dit_accel.kernels.reorder import take_rows

    if plan.q_order is not None:
        q = take_rows(q, plan.q_order)
    if plan.k_order is not None:
        k, v = take_rows(k, plan.k_order), take_rows(v, plan.k_order)
    return q, k, v, replace(plan, q_order=None, k_order=None)


def as_they_came(out: Tensor, lse: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Put rows back where the queries came from."""
    if plan.q_order is None:
        return out, lse
    from dit_accel.kernels.reorder import put_rows

    return put_rows(out, plan.q_order), put_rows(lse[..., None], plan.q_order)[..., 0]


def run_feedback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    impl: str,
    precision: str,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_sparse_feedback` on validated `[B, H, S, D]`."""
    needed = torch.zeros(
        *q.shape[:2], *plan.indices.shape[2:], dtype=torch.uint8, device=q.device
    )  # a byte each: kernels write no bits
    out, lse = run(q, k, v, plan, scale, impl, precision, Feedback(threshold, needed))
    return out, lse, needed.view(torch.bool)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    impl: str,
    precision: str = "full",
    feedback: Feedback | None = None,
    config: Config | None = None,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`block_sparse` on validated `[B, H, S, D]`; what `feedback` asks for is written into it."""
    name = choose(q, k, v, plan, impl, precision, feedback is not None, pv_threshold is not None)
    given = dict(feedback=feedback, config=config, pv_threshold=pv_threshold)
    asked = {option: value for option, value in given.items() if value is not None}
    with torch.no_grad():
        if precision != "full":
            return _run_quantised(name, q, k, v, plan, scale, precision, asked)
        match name:
            case "reference":
                from .reference import block_sparse as attend
            case "cpu":
                from .cpu import block_sparse as attend
            case "triton":
                from .triton import block_sparse as attend
            case "hopper":
                from .hopper import block_sparse as attend
            case "flash4":
                from .flash4 import block_sparse as attend
            case "flex":
                from .flex import block_sparse as attend
        return attend(q, k, v, plan, scale, **asked)


def _run_quantised(
    name: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, mode: str, asked: dict
) -> tuple[Tensor, Tensor]:
    match name:
        case "reference":
            from .reference import block_sparse_quantised as attend
        case "hopper":
            from .hopper import block_sparse_quantised as attend
        case "triton":
            from .triton import block_sparse_quantised as attend
    if scale <= 0:  # the kernels scale by powers of two of a positive number
        q, scale = -q, max(-scale, 1e-30)
    return attend(quantize_blocks(q, k, v, plan, mode), plan, scale, q, **asked)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    impl: str = "auto",
    precision: str = "full",
    feedback: bool = False,
    pv_skip: bool = False,
) -> str:
    """The implementation that will run. "auto" is the CPU's own on a CPU; on CUDA "hopper" where it can run, on an
    H100 or H200, else "triton". "flash4" and "flex" run by name only: the one is no faster where we could measure it.

    Where Triton cannot run a CUDA call, "auto" raises as the named choice would: the reference is an oracle, not
    something to fall back to unseen.

    Args:
        q, k, v: `[B, H, S, D]`.
        plan: the call's plan.
        impl: "auto" or a name.
        precision: "full" or a quantised mode; for a mode "auto" is "reference" on the CPU.
        feedback: whether the call asks which entries mattered.
        pv_skip: whether the call has a `pv_threshold`.

    Raises:
        UnknownNameError: no such implementation.
        KernelUnavailable: it cannot run this call; the message says why.
    """
    if impl == "auto" and q.device.type == "cuda":
        known = dict(precision=precision, pv_skip=pv_skip)
        hopper = precision in ("int8_fp8", "fp8") or why_not("hopper", q, k, v, plan, **known) is None
        impl = "hopper" if hopper else "triton"
    elif impl == "auto":
        impl = "cpu" if precision == "full" else "reference"
    reason = why_not(impl, q, k, v, plan, precision, feedback, pv_skip)
    if reason is not None:
        raise KernelUnavailable(f"block_sparse impl={impl!r} cannot run this call: {reason}")
    return impl


def why_not(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    precision: str = "full",
    feedback: bool = False,
    pv_skip: bool = False,
) -> str | None:
    """Why `impl` cannot run this call, or None if it can. Arguments as in `choose`.

    Raises:
        UnknownNameError: no such implementation.
    """
    if impl not in IMPLEMENTATIONS:
        raise unknown_name("block_sparse implementation", impl, (*IMPLEMENTATIONS, "auto"))
    if precision != "full":
        where = ("reference", "hopper", "triton") if precision == "int8" else ("reference", "hopper")
        if impl not in where:
            return f"precision {precision!r} runs on {', '.join(where)} only."
        if q.dtype == torch.float64 or max(plan.max_q_block, plan.max_k_block) > ROWS:
            return f"quantised attention takes no float64 and no block above {ROWS} tokens."
    if feedback and (impl in ("flash4", "flex") or (impl == "reference" and precision != "full")):
        return "it does not tell which entries mattered (feedback)."
    if pv_skip and (impl in ("hopper", "flash4", "flex") or precision not in ("full", "int8")):
        return "it leaves out no tiles (pv_threshold): reference, cpu and triton do, in precision 'full' and 'int8'."
    if impl in ("triton", "hopper"):
        return _why_not_compiled(impl, q, k, v, plan)
    if impl in ("flash4", "flex"):
        from . import flash4, flex

        return (flash4 if impl == "flash4" else flex).why_not(q, plan)
    if q.dtype not in (*FLOATS, torch.float64):
        return f"it takes float32, float16, bfloat16 and float64, not {q.dtype}."
    if impl == "cpu" and q.device.type != "cpu":
        return f"the tensors are on {q.device}; it runs on the CPU only."
    return None


def _why_not_compiled(impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with `pip install triton`."
    if impl == "triton":
        from . import triton as pointers

        return pointers.why_not(q, plan)
    try:
        from . import hopper
    except ImportError as error:
        return f"this Triton has no Gluon as of version 3.6 ({error})."
    return hopper.why_not(q, k, v, plan)


def _validate(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    """Raise UsageError unless q, k, v (`[B, H, S, D]`) and the plan describe one call."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise UsageError(f"{name} must have 4 dimensions, got shape {tuple(x.shape)}.")
        if x.dtype != q.dtype or x.device != q.device:
            raise UsageError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; make them alike."
            )
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise UsageError(
            "q, k and v must agree in batch, heads and head size, and k and v in everything; got [B, H, S, D] = "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if plan.device != q.device:
        raise UsageError(f"The plan is on {plan.device}, q on {q.device}; build the plan where q is.")
    for axis, what in enumerate(("batch", "head")):
        if plan.lead[axis] not in (1, q.shape[axis]):
            raise UsageError(
                f"The plan's {what} size is {plan.lead[axis]}; q's is {q.shape[axis]}. Use that or 1."
            )
    for name, order in (("q_order", plan.q_order), ("k_order", plan.k_order)):
        if order is not None and any(
            n not in (1, m) for n, m in zip(order.shape[:2], q.shape[:2], strict=True)
        ):
            raise UsageError(
                f"{name} {tuple(order.shape)} must have q's batch and heads {tuple(q.shape[:2])}, or 1."
            )
    for side, tokens, x in (("query", plan.n_q_tokens, q), ("key", plan.n_k_tokens, k)):
        if tokens != x.shape[2]:
            raise UsageError(f"The plan covers {tokens} {side} tokens, but there are {x.shape[2]}.")
