"""Quantisation in Triton: one program for each block of each head and operand, one pass over q, k and v each.

The mean key comes from the means of the key blocks, the largest magnitude of every channel of v from that of every
block, both reduced in a fixed order.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.pooling import block_means
from dit_accel.plan import BlockPlan, lead_strides

from .api import ROWS, SMALLEST_SCALE, Mode, Quantised

FP8_MAX = 448.0  # of e4m3


def why_not(q: Tensor) -> str | None:
    """Why these kernels cannot run, or None. q: `[B, H, S, D]`."""
    if q.device.type != "cuda" and isinstance(quantize_rows_kernel, triton.JITFunction):
        return f"the tensors are on {q.device}; they run on CUDA devices."
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"they take float32, float16 and bfloat16, not {q.dtype}."
    if q.shape[3] not in (16, 32, 64, 128, 256):
        return f"head size {q.shape[3]} is not 16, 32, 64, 128 or 256."
    return None


def quantize_blocks(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, mode: Mode) -> Quantised:
    """Launch the kernels on the current stream. Arguments and results as in `api.quantize_blocks`."""
    batch, heads, _, head = q.shape
    n_q, n_k, device = plan.n_q, plan.n_k, q.device
    fp8_values = mode.values is not None
    integers = mode.scores == torch.int8
    options = {"ROWS": ROWS, "HEAD": head, "num_warps": 8, "enable_fp_fusion": True}

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=device)

    lengths = plan.k_starts.diff(dim=-1)[..., None]
    mean = (block_means(k.transpose(1, 2), plan.k_starts, plan.max_k_block) * lengths).sum(
        2
    ) / plan.n_k_tokens
    q8, q_scale, shift = new(n_q * ROWS, head, dtype=mode.scores), new(n_q * ROWS), new(n_q * ROWS)
    k8, k_scale = new(n_k * ROWS, head, dtype=mode.scores), new(n_k)
    v8 = new(head, n_k * ROWS, dtype=mode.values) if fp8_values else new(n_k * ROWS, head, dtype=v.dtype)
    v_scale = torch.ones(batch, heads, head, device=device)
    with torch.cuda.device(device) if q.is_cuda else nullcontext():
        starts = (plan.q_starts, *lead_strides(plan.q_starts), heads, n_q)
        quantize_rows_kernel[(n_q, heads, batch)](
            *(q, mean, q8, q_scale, shift, *q.stride(), *starts),
            INTEGERS=integers,
            SMALLEST=SMALLEST_SCALE,
            **options,
        )
        starts = (plan.k_starts, *lead_strides(plan.k_starts), heads, n_k)
        quantize_keys_kernel[(n_k, heads, batch)](
            *(k, mean, k8, k_scale, *k.stride(), *starts),
            INTEGERS=integers,
            IN_KEY_ORDER=fp8_values,
            SMALLEST=SMALLEST_SCALE,
            **options,
        )
        if fp8_values:
            largest = new(n_k, head)
            channel_peaks_kernel[(n_k, heads, batch)](v, largest, *v.stride(), *starts, **options)
            v_scale = (largest.amax(2) / FP8_MAX).clamp(min=SMALLEST_SCALE)
        pack_values_kernel[(n_k, heads, batch)](
            *(v, v_scale, v8, *v.stride(), *starts), FP8_VALUES=fp8_values, **options
        )
    return Quantised(mode, q8, q_scale, shift, k8, k_scale, v8, v_scale)


# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
UNSPECIALIZED = ("stride_xb", "stride_xh", "stride_sb", "stride_sh", "heads", "blocks")


@triton.jit
def _load_block(
    x, starts, stride_xb, stride_xh, stride_xs, stride_xd, stride_sb, stride_sh, rows,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Tokens `rows` of this program's block in fp32, zeros behind its end; and which there are."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p_start = starts + i_b * stride_sb + i_h * stride_sh + tl.program_id(0)
    low = tl.load(p_start)
    token = low + rows
    inside = token < tl.load(p_start + 1)
    place = token.to(tl.int64)[:, None] * stride_xs + tl.arange(0, HEAD)[None, :] * stride_xd
    return tl.load(x + i_b * stride_xb + i_h * stride_xh + place, mask=inside[:, None], other=0.0).to(
        tl.float32
    ), inside


@triton.jit
def _round_to(x, dtype: tl.constexpr, INTEGERS: tl.constexpr):
    """To the nearest number of the format, ties to even."""
    if INTEGERS:
        x = tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, -127.0), 127.0)
    return x.to(dtype)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_rows_kernel(
    x, mean, out, scales, shift,
    stride_xb, stride_xh, stride_xs, stride_xd,
    starts, stride_sb, stride_sh, heads, blocks,
    INTEGERS: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Queries: a scale for each row, and the row times the mean key."""
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, HEAD)
    b_x, _inside = _load_block(
        x, starts, stride_xb, stride_xh, stride_xs, stride_xd, stride_sb, stride_sh, rows, HEAD
    )
    i_bh = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    b_mean = tl.load(mean + i_bh * HEAD + lanes)
    largest: tl.constexpr = 127.0 if INTEGERS else 448.0
    scale = tl.maximum(tl.max(tl.abs(b_x), 1) / largest, SMALLEST)
    place = (i_bh * blocks + tl.program_id(0)) * ROWS + rows
    tl.store(scales + place, scale)
    tl.store(shift + place, tl.sum(b_x * b_mean[None, :], 1))
    b_out = _round_to(b_x / scale[:, None], out.dtype.element_ty, INTEGERS)
    tl.store(out + place[:, None] * HEAD + lanes[None, :], b_out)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_keys_kernel(
    x, mean, out, scales,
    stride_xb, stride_xh, stride_xs, stride_xd,
    starts, stride_sb, stride_sh, heads, blocks,
    INTEGERS: tl.constexpr,
    IN_KEY_ORDER: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Keys less the mean key: a scale for each block."""
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, HEAD)
    tokens = rows
    if IN_KEY_ORDER:  # api.KEY_ORDER: bits 0, 1, 2, 3 of the row are bits 0, 2, 3, 1 of the token
        tokens = (rows & ~14) | ((rows >> 3) & 1) << 1 | ((rows >> 1) & 3) << 2
    b_x, inside = _load_block(
        x, starts, stride_xb, stride_xh, stride_xs, stride_xd, stride_sb, stride_sh, tokens, HEAD
    )
    i_bh = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    b_x = tl.where(inside[:, None], b_x - tl.load(mean + i_bh * HEAD + lanes)[None, :], 0.0)
    largest: tl.constexpr = 127.0 if INTEGERS else 448.0
    scale = tl.maximum(tl.max(tl.max(tl.abs(b_x), 1), 0) / largest, SMALLEST)
    block = i_bh * blocks + tl.program_id(0)
    tl.store(scales + block, scale)
    b_out = _round_to(b_x / scale, out.dtype.element_ty, INTEGERS)
    tl.store(out + (block * ROWS + rows)[:, None] * HEAD + lanes[None, :], b_out)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def channel_peaks_kernel(
    x, out,
    stride_xb, stride_xh, stride_xs, stride_xd,
    starts, stride_sb, stride_sh, heads, blocks,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Values: the largest magnitude of each channel within a block."""
    rows = tl.arange(0, ROWS)
    b_x, _inside = _load_block(
        x, starts, stride_xb, stride_xh, stride_xs, stride_xd, stride_sb, stride_sh, rows, HEAD
    )
    block = (tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)) * blocks + tl.program_id(0)
    tl.store(out + block * HEAD + tl.arange(0, HEAD), tl.max(tl.abs(b_x), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def pack_values_kernel(
    x, scales, out,
    stride_xb, stride_xh, stride_xs, stride_xd,
    starts, stride_sb, stride_sh, heads, blocks,
    FP8_VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Values: fp8, channels outermost; or as they are."""
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, HEAD)
    b_x, _inside = _load_block(
        x, starts, stride_xb, stride_xh, stride_xs, stride_xd, stride_sb, stride_sh, rows, HEAD
    )
    i_bh = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    first = tl.program_id(0) * ROWS
    if FP8_VALUES:
        b_out = (b_x / tl.load(scales + i_bh * HEAD + lanes)[None, :]).to(out.dtype.element_ty)
        place = (i_bh * HEAD + lanes)[:, None] * (blocks.to(tl.int64) * ROWS) + (first + rows)[None, :]
        tl.store(out + place, tl.trans(b_out))
    else:
        place = (i_bh * blocks * ROWS + first + rows)[:, None] * HEAD + lanes[None, :]
        tl.store(out + place, b_x.to(out.dtype.element_ty))
