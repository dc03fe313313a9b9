"""Quantisation in Triton: a pass over v for the largest magnitude of each channel, then one launch for q, k and v.

One program takes a block of a head. The largest magnitudes meet in memory, in whatever order: a maximum does not mind.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import BlockPlan, lead_strides

from .api import ROWS, SMALLEST_SCALE, Mode, Quantised

WARPS = 4  # of a program; on an H200 a tenth faster than 8


def why_not(q: Tensor) -> str | None:
    """Why these kernels cannot run, or None. q: `[B, H, S, D]`."""
    if q.device.type != "cuda" and isinstance(quantize_kernel, triton.JITFunction):
        return f"the tensors are on {q.device}; they run on CUDA devices."
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"they take float32, float16 and bfloat16, not {q.dtype}."
    if q.shape[3] not in (16, 32, 64, 128, 256):
        return f"head size {q.shape[3]} is not 16, 32, 64, 128 or 256."
    return None


def quantize_blocks(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, plan: BlockPlan, mode: Mode) -> Quantised:
    """Launch the kernels on the current stream. Arguments and results as in `api.quantize_blocks`."""
    batch, heads, _, head = q.shape
    n_q, n_k, device = plan.n_q, plan.n_k, q.device
    fp8_values = mode.values is not None
    options = {"ROWS": ROWS, "HEAD": head, "num_warps": WARPS, "enable_fp_fusion": True}

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=device)

    q8, q_scale, shift = new(n_q * ROWS, head, dtype=mode.scores), new(n_q * ROWS), new(n_q * ROWS)
    k8, k_scale = new(n_k * ROWS, head, dtype=mode.scores), new(n_k)
    v8 = new(head, n_k * ROWS, dtype=mode.values) if fp8_values else new(n_k * ROWS, head, dtype=v.dtype)
    v_scale, peaks = new(head), torch.zeros(batch, heads, head, device=device)
    q_starts = (plan.q_starts, *lead_strides(plan.q_starts))
    k_starts = (plan.k_starts, *lead_strides(plan.k_starts))
    with torch.cuda.device(device) if q.is_cuda else nullcontext():
        if fp8_values:
            channel_peaks_kernel[(n_k, heads, batch)](v, peaks, *v.stride(), *k_starts, heads, **options)
        quantize_kernel[(n_q + 2 * n_k, heads, batch)](
            *(q, k, v, mean, peaks, q8, q_scale, shift, k8, k_scale, v8, v_scale),
            *(*q.stride(), *k.stride(), *v.stride(), *q_starts, *k_starts, heads, n_q, n_k),
            INTEGERS=mode.scores == torch.int8,
            FP8_VALUES=fp8_values,
            SMALLEST=SMALLEST_SCALE,
            **options,
        )
    return Quantised(mode, q8, q_scale, shift, k8, k_scale, v8, v_scale)


# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
# Strides of rows of D numbers are not among them: that all of them are multiples of 16 lets a thread move 16 bytes.
UNSPECIALIZED = ("stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh", "heads", "n_q", "n_k")


@triton.jit
def _load_block(
    x, stride_xb, stride_xh, stride_xs, stride_xd, starts, stride_sb, stride_sh, block, rows,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Tokens `rows` of a block in fp32, zeros behind its end; and which there are."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p_start = starts + i_b * stride_sb + i_h * stride_sh + block
    low = tl.load(p_start)
    token = low + rows
    inside = token < tl.load(p_start + 1)
    place = token.to(tl.int64)[:, None] * stride_xs + tl.arange(0, HEAD)[None, :] * stride_xd
    found = tl.load(x + i_b * stride_xb + i_h * stride_xh + place, mask=inside[:, None], other=0.0)
    return found.to(tl.float32), inside


@triton.jit
def _round_to(x, dtype: tl.constexpr, INTEGERS: tl.constexpr):
    """To the nearest number of the format, ties to even."""
    if INTEGERS:
        x = tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, -127.0), 127.0)
    return x.to(dtype)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def channel_peaks_kernel(
    x, out,
    stride_xb, stride_xh, stride_xs, stride_xd,
    starts, stride_ksb, stride_ksh, heads,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of each channel of a head; `out` begins as zeros."""
    b_x, _inside = _load_block(
        x, stride_xb, stride_xh, stride_xs, stride_xd, starts, stride_ksb, stride_ksh,
        tl.program_id(0), tl.arange(0, ROWS), HEAD,
    )  # fmt: skip
    i_bh = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    tl.atomic_max(out + i_bh * HEAD + tl.arange(0, HEAD), tl.max(tl.abs(b_x), 0), sem="relaxed")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_kernel(
    q, k, v, mean, peaks, q8, q_scale, shift, k8, k_scale, v8, v_scale,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    q_starts, stride_qsb, stride_qsh, k_starts, stride_ksb, stride_ksh, heads, n_q, n_k,
    INTEGERS: tl.constexpr,
    FP8_VALUES: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    """A block of queries (a scale for each row, and the row times the mean key), of keys less the mean key (a scale for
    the block), or of values (a scale for each channel, channels outermost; or as they are)."""
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, HEAD)
    i_bh = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    block = tl.program_id(0)
    largest: tl.constexpr = 127.0 if INTEGERS else 448.0
    if block < n_q:
        b_q, _inside = _load_block(
            q, stride_qb, stride_qh, stride_qs, stride_qd, q_starts, stride_qsb, stride_qsh, block, rows, HEAD
        )
        b_mean = tl.load(mean + i_bh * HEAD + lanes)
        q_step = tl.maximum(tl.div_rn(tl.max(tl.abs(b_q), 1), largest), SMALLEST)
        q_row = (i_bh * n_q + block) * ROWS + rows
        tl.store(q_scale + q_row, q_step)
        tl.store(shift + q_row, tl.sum(b_q * b_mean[None, :], 1))
        b_q8 = _round_to(b_q * tl.div_rn(1.0, q_step)[:, None], q8.dtype.element_ty, INTEGERS)
        tl.store(q8 + q_row[:, None] * HEAD + lanes[None, :], b_q8)
    elif block < n_q + n_k:
        block -= n_q
        tokens = rows
        if FP8_VALUES:  # api.KEY_ORDER: bits 0, 1, 2, 3 of the row are bits 0, 2, 3, 1 of the token
            tokens = (rows & ~14) | ((rows >> 3) & 1) << 1 | ((rows >> 1) & 3) << 2
        b_k, inside = _load_block(
            k,
            stride_kb,
            stride_kh,
            stride_ks,
            stride_kd,
            k_starts,
            stride_ksb,
            stride_ksh,
            block,
            tokens,
            HEAD,
        )
        b_k = tl.where(inside[:, None], b_k - tl.load(mean + i_bh * HEAD + lanes)[None, :], 0.0)
        k_step = tl.maximum(tl.div_rn(tl.max(tl.max(tl.abs(b_k), 1), 0), largest), SMALLEST)
        tl.store(k_scale + i_bh * n_k + block, k_step)
        b_k8 = _round_to(b_k * tl.div_rn(1.0, k_step), k8.dtype.element_ty, INTEGERS)
        k_row = (i_bh * n_k + block) * ROWS + rows
        tl.store(k8 + k_row[:, None] * HEAD + lanes[None, :], b_k8)
    else:
        block -= n_q + n_k
        b_v, _inside = _load_block(
            v, stride_vb, stride_vh, stride_vs, stride_vd, k_starts, stride_ksb, stride_ksh, block, rows, HEAD
        )
        v_step = tl.full([HEAD], 1.0, tl.float32)
        if FP8_VALUES:
            v_step = tl.maximum(tl.div_rn(tl.load(peaks + i_bh * HEAD + lanes), 448.0), SMALLEST)
            b_v8 = (b_v * tl.div_rn(1.0, v_step)[None, :]).to(v8.dtype.element_ty)
            place = (i_bh * HEAD + lanes)[:, None] * (n_k.to(tl.int64) * ROWS) + (block * ROWS + rows)[
                None, :
            ]
            tl.store(v8 + place, tl.trans(b_v8))
        else:
            place = ((i_bh * n_k + block) * ROWS + rows)[:, None] * HEAD + lanes[None, :]
            tl.store(v8 + place, b_v.to(v8.dtype.element_ty))
        if block == 0:
            tl.store(v_scale + i_bh * HEAD + lanes, v_step)
