"""Block-sparse attention forward in Triton: one program per query block and head, pointers only (sm_80 and newer).

The online softmax runs in base 2 with the scale folded into the scores:

    s = q k^T * scale * log2(e);  m' = max(m, rowmax s);  a = 2^(m - m');  p = 2^(s - m')
    l' = l a + rowsum p;  acc' = acc a + p v;  out = acc / l;  lse = (m + log2 l) ln 2

One program takes `BLOCK_M` rows of one query block and walks its list from last to first. A key block is read in
steps of `BLOCK_N` rows; rows past its end belong to the next block and are masked. One fixed configuration per head
size and type, unless `tuning.tune` found another: none is used that was not compiled and checked. Source of the online
form: FlashAttention-2, arXiv:2307.08691, algorithm 1.

With 8-bit integer copies of q and k (`kernels/quantize`, mode "int8") the first product is one of integers, which every
chip since sm_80 multiplies twice as fast; the second stays as it is:

    s = (q8 k8^T) * q_scale[row] * k_scale[block] * scale * log2(e);  lse += shift[row] * scale

With a `pv_threshold` a program asks of each tile of `BLOCK_M` x `BLOCK_N` scores, once it has their maxima, whether any
row's is above m + threshold, and if none is goes on to the next: no exponentials, no second product, m as it was. The
values are copied all the same: the copy is under way long before the answer is known.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.quantize import ROWS, Quantised
from dit_accel.plan import BlockPlan, lead_strides

from .feedback import Feedback

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


@dataclass(frozen=True)
class Config:
    """A compiled shape of the kernel."""

    block_m: int  # query rows of one program
    block_n: int  # key rows of one step
    warps: int
    stages: int


# What `tuning.tune` found fastest, by compute capability and padded head size, for 16-bit types and blocks of 128 keys.
TUNED = {
    (90, 64): Config(128, 64, 8, 3),  # H200, Triton 3.6
    (90, 128): Config(128, 128, 8, 3),  # H200, Triton 3.6
}


def config_for(head: int, dtype: torch.dtype, capability: int | None = None, longest_k: int = 128) -> Config:
    """The one configuration for this head size (padded to a power of two) and type.

    Outside of `TUNED` it fits the 99 KB of shared memory of sm_86 and sm_89.

    Args:
        capability: of the chip, such as 90.
        longest_k: no key block is longer.
    """
    padded = padded_head(head)
    if dtype == torch.float32:
        # Full-precision products run on the scalar units: small tiles keep everything in registers.
        return Config(16, 32, 8, 1) if padded > 64 else Config(64, 32, 8, 1)
    tuned = TUNED.get((capability, padded))
    if tuned is not None and longest_k > 64:
        return tuned
    if padded > 128:
        return Config(64, 32, 4, 2)
    return Config(128, 64, 8, 2) if padded == 128 else Config(128, 64, 4, 3)


def padded_head(head: int) -> int:
    """The head size a program works on: the next power of two, at least 16 (the smallest `tl.dot` takes)."""
    return max(16, triton.next_power_of_2(head))


def capability_of(device: torch.device) -> int | None:
    """Compute capability of a GPU, such as 90; None of anything else."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def why_not(q: Tensor, plan: BlockPlan) -> str | None:
    """Why this kernel cannot run, or None. q: `[B, H, S, D]`."""
    if q.device.type != "cuda" and not interpreting():
        return f"the tensors are on {q.device}; it runs on CUDA devices."
    if q.dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {q.dtype}."
    if q.shape[3] > LARGEST_HEAD:
        return f"head size {q.shape[3]} is above {LARGEST_HEAD}."
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"{torch.cuda.get_device_name(q.device)} is older than sm_80."
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU (TRITON_INTERPRET=1 before this module is imported)."""
    return not isinstance(block_sparse_kernel, triton.JITFunction)


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    feedback: Feedback | None = None,
    config: Config | None = None,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the current stream. Arguments and results as in `reference.block_sparse`."""
    return _launch(q, k, v, None, plan, scale, q, feedback, config, pv_threshold)


def block_sparse_quantised(
    parts: Quantised,
    plan: BlockPlan,
    scale: float,
    like: Tensor,
    feedback: Feedback | None = None,
    config: Config | None = None,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `block_sparse`, from quantised copies in mode "int8"; `out` is shaped and typed as `like`."""
    return _launch(parts.q8, parts.k8, parts.v8, parts, plan, scale, like, feedback, config, pv_threshold)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Quantised | None,
    plan: BlockPlan,
    scale: float,
    like: Tensor,
    feedback: Feedback | None,
    config: Config | None,
    pv_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, n_q, head = like.shape
    config = config or config_for(head, like.dtype, capability_of(like.device), plan.max_k_block)
    out = torch.empty_like(like)
    lse = torch.empty(batch, heads, n_q, dtype=torch.float32, device=like.device)
    scales = (lse, lse, lse) if parts is None else (parts.q_scale, parts.k_scale, parts.shift)
    assert feedback is None or pv_threshold is None  # one threshold: no call has both
    threshold = feedback.threshold if feedback is not None else pv_threshold or 0.0
    # A program covers block_m rows of a query block; longer blocks take several.
    pieces = max(1, triton.cdiv(plan.max_q_block, config.block_m))
    grid = (plan.n_q * pieces, heads, batch)
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        block_sparse_kernel[grid](
            *(q, k, v, out, lse, *scales),
            *(plan.counts, plan.indices, plan.q_starts, plan.k_starts),
            *(*q.stride(), *k.stride(), *v.stride(), *out.stride(), *lse.stride()[:2]),
            *(*lead_strides(plan.counts), *lead_strides(plan.indices), plan.indices.stride(2)),
            *(*lead_strides(plan.q_starts), *lead_strides(plan.k_starts)),
            *(lse if feedback is None else feedback.needed, threshold),
            scale * math.log2(math.e),
            *(pieces, plan.n_q, plan.n_k, plan.indices.shape[3], heads),
            HEAD=head,
            BLOCK_D=padded_head(head),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            STEPS=max(1, triton.cdiv(plan.max_k_block, config.block_n)),
            # The interpreter multiplies the bit patterns of bfloat16 operands, silently.
            UPCAST=interpreting() and like.dtype == torch.bfloat16,
            FEEDBACK=feedback is not None,
            PV_SKIP=pv_threshold is not None,
            STAGES=config.stages,
            RESERVED=0 if parts is None else ROWS,
            num_warps=config.warps,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
            num_stages=config.stages,
        )
    return out, lse


# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
UNSPECIALIZED = (
    *("stride_lb", "stride_lh", "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_iq"),
    *(
        "stride_qsb",
        "stride_qsh",
        "stride_ksb",
        "stride_ksh",
        "pieces",
        "n_q",
        "n_k",
        "width",
        "heads",
        "threshold",
    ),
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def block_sparse_kernel(
    q, k, v, out, lse, q_scale, k_scale, shift,
    counts, indices, q_starts, k_starts,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_os, stride_od,
    stride_lb, stride_lh,
    stride_cb, stride_ch,
    stride_ib, stride_ih, stride_iq,
    stride_qsb, stride_qsh,
    stride_ksb, stride_ksh,
    needed, threshold,
    scale_log2,
    pieces, n_q, n_k, width, heads,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    UPCAST: tl.constexpr,
    FEEDBACK: tl.constexpr,
    PV_SKIP: tl.constexpr,
    STAGES: tl.constexpr,
    RESERVED: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_M` rows of one query block of one head. Offsets are int64: tensors may pass 2^31 elements.

    PV_SKIP: leave out tiles of `BLOCK_M` x `BLOCK_N` below `threshold`, which is the feedback's otherwise.
    STAGES: `num_stages` once more. Said of the loop itself, it has the values copied ahead also where their product
        stands behind a condition.
    RESERVED: rows that quantised copies have for each block; 0 for q, k and v themselves.
    """
    i_block = tl.program_id(0) // pieces
    i_part = tl.program_id(0) % pieces
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)

    p_start = q_starts + i_b * stride_qsb + i_h * stride_qsh + i_block
    first = tl.load(p_start) + i_part * BLOCK_M
    end = tl.load(p_start + 1)
    if first >= end:
        return

    rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_D)
    row_ok = rows < end
    q_ok = row_ok[:, None] if HEAD == BLOCK_D else row_ok[:, None] & (lanes < HEAD)[None, :]

    q_rows = rows
    if RESERVED:
        q_rows = (i_block * RESERVED + i_part * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        q_place = (i_b * heads + i_h) * n_q * RESERVED + q_rows
        factor = tl.load(q_scale + q_place, mask=row_ok, other=0.0) * scale_log2
    p_q = q + i_b * stride_qb + i_h * stride_qh + q_rows[:, None] * stride_qs + lanes[None, :] * stride_qd
    b_q = tl.load(p_q, mask=q_ok, other=0)
    if UPCAST and not RESERVED:
        b_q = b_q.to(tl.float32)

    k_head = k + i_b * stride_kb + i_h * stride_kh
    v_head = v + i_b * stride_vb + i_h * stride_vh
    starts_head = k_starts + i_b * stride_ksb + i_h * stride_ksh
    p_list = indices + i_b * stride_ib + i_h * stride_ih + i_block.to(tl.int64) * stride_iq
    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_block)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if FEEDBACK:
        p_needed = needed + (((i_b * heads + i_h) * n_q + i_block) * width + count - 1)
        tl.store(p_needed, 1, mask=count > 0)  # what is visited first

    # One flat loop over (list entry, step in its block), so that loads are pipelined across blocks.
    for i in tl.range(0, count * STEPS, num_stages=STAGES):
        entry = tl.load(p_list + (count - 1 - i // STEPS))
        low = tl.load(starts_head + entry) + (i % STEPS) * BLOCK_N
        high = tl.load(starts_head + entry + 1)
        key_ok = low + columns < high
        keys = (low + columns).to(tl.int64)
        if RESERVED:
            keys = (entry * RESERVED + (i % STEPS) * BLOCK_N + columns).to(tl.int64)
        kt_ok = key_ok[None, :] if HEAD == BLOCK_D else key_ok[None, :] & (lanes < HEAD)[:, None]
        v_ok = key_ok[:, None] if HEAD == BLOCK_D else key_ok[:, None] & (lanes < HEAD)[None, :]

        b_kt = tl.load(k_head + keys[None, :] * stride_ks + lanes[:, None] * stride_kd, mask=kt_ok, other=0)
        if UPCAST and not RESERVED:
            b_kt = b_kt.to(tl.float32)
        if RESERVED:
            step = tl.load(k_scale + (i_b * heads + i_h) * n_k + entry)
            scores = tl.dot(b_q, b_kt).to(tl.float32) * (factor * step)[:, None]
        else:
            scores = tl.dot(b_q, b_kt, input_precision="ieee") * scale_log2
        scores = tl.where(key_ok[None, :], scores, -float("inf"))

        peak = tl.max(scores, 1)
        if FEEDBACK:
            # Every row that needs the entry says so. A block's steps are one entry: at a threshold of at most 0 its
            # first step cannot raise the maximum without being needed itself.
            more = row_ok & (peak > top + threshold)
            tl.store(p_needed - i // STEPS + tl.zeros([BLOCK_M], tl.int32), 1, mask=more)
        if PV_SKIP:
            p_v = v_head + keys[:, None] * stride_vs + lanes[None, :] * stride_vd
            b_v = tl.load(p_v, mask=v_ok, other=0.0)
            # A NaN is not below anything. With a second dimension, because reducing a vector that is a slice crashes
            # Triton 3.7 where it compiles for sm_100.
            more = (row_ok & ~(peak <= top + threshold)).to(tl.int32)[:, None]
        if (tl.max(more) > 0) if PV_SKIP else True:  # Triton 3.2 knows no other way to leave out a condition
            new_top = tl.maximum(top, peak)
            # While a row has met no key its maximum is -inf, and -inf - -inf would be NaN.
            anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
            weights = tl.math.exp2(scores - anchor[:, None])
            fade = tl.math.exp2(top - anchor)
            total = total * fade + tl.sum(weights, 1)
            top = new_top

            # Masked to zero, not only weighted by zero: 0 times a stray NaN is NaN.
            if not PV_SKIP:
                p_v = v_head + keys[:, None] * stride_vs + lanes[None, :] * stride_vd
                b_v = tl.load(p_v, mask=v_ok, other=0.0)
            if UPCAST:
                b_v = b_v.to(tl.float32)
            acc = acc * fade[:, None]
            acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision="ieee")

    empty = total == 0.0
    b_out = acc / tl.where(empty, 1.0, total)[:, None]
    b_lse = tl.where(empty, -float("inf"), (top + tl.math.log2(total)) * 0.6931471805599453)
    if RESERVED:  # what the mean key would have added
        b_lse += tl.load(shift + q_place, mask=row_ok, other=0.0) * (scale_log2 * 0.6931471805599453)
    p_out = out + i_b * stride_ob + i_h * stride_oh + rows[:, None] * stride_os + lanes[None, :] * stride_od
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=q_ok)
    tl.store(lse + i_b * stride_lb + i_h * stride_lh + rows, b_lse, mask=row_ok)
