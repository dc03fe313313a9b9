"""Block means as further keys and values, in Triton: one program for some rows of a query block of a head."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import lead_strides

ROWS = 64  # of a query block, at once
MIXED_ROWS = 32  # the same where they are only mixed
MEANS = 64  # key blocks at once
LARGEST_HEAD = 256
LOG2_E = 1.4426950408889634


def why_not(out: Tensor) -> str | None:
    """Why these kernels cannot run, or None. out: `[B, H, S, D]`."""
    if out.device.type != "cuda" and isinstance(mix_kernel, triton.JITFunction):
        return f"the tensors are on {out.device}; it runs on CUDA devices."
    if out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {out.dtype}."
    if out.shape[3] > LARGEST_HEAD:
        return f"head size {out.shape[3]} is above {LARGEST_HEAD}."
    return None


def launch_of(dim: int) -> tuple[int, int]:
    """Warps and stages with which no compiler that was tried spills."""
    return (4, 1) if dim <= 64 else (8, 2)


def attend_on(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    coarse: Tensor,
    starts: Tensor,
    max_block: int,
    scale: float,
) -> None:
    """Launch on the current stream. Arguments as in `reference.attend_on`."""
    batch, heads, tokens, dim = out.shape
    blocks, means = coarse.shape[2:]
    parts = max(1, triton.cdiv(max_block, ROWS))
    keys, values = (x.to(q.dtype).contiguous() for x in (keys, values))
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        attend_on_kernel[(blocks * parts, heads, batch)](
            *(out, lse.contiguous(), q, keys, values, coarse.contiguous(), starts),
            *out.stride(),
            *q.stride(),
            *lead_strides(starts),
            *(heads, blocks, means, tokens, parts, scale * LOG2_E),
            DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            ROWS=ROWS,
            MEANS=MEANS,
            LOG2_E=LOG2_E,
            **dict(zip(("num_warps", "num_stages"), launch_of(dim), strict=True)),
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )


def mix(out: Tensor, above: Tensor, mixed_in: Tensor, starts: Tensor, max_block: int) -> None:
    """Launch on the current stream. Arguments as in `reference.mix`."""
    batch, heads, _, dim = out.shape
    blocks = starts.shape[2] - 1
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        mix_kernel[(blocks, heads, batch)](
            *(out, above.contiguous(), mixed_in.contiguous(), starts),
            *out.stride(),
            *lead_strides(starts),
            *(heads, blocks),
            STEPS=max(1, triton.cdiv(max_block, MIXED_ROWS)),
            DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            ROWS=MIXED_ROWS,
            num_warps=4,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )


# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
# Strides of rows of D numbers are not among them: that all of them are multiples of 16 lets a thread move 16 bytes.
UNSPECIALIZED = ("stride_sb", "stride_sh", "heads", "blocks")
ON_UNSPECIALIZED = (*UNSPECIALIZED, "means", "tokens", "parts")


@triton.jit(do_not_specialize=ON_UNSPECIALIZED)
def attend_on_kernel(
    out, lse, q, keys, values, coarse, starts,
    stride_ob, stride_oh, stride_os, stride_od,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_sb, stride_sh,
    heads, blocks, means, tokens, parts, scale_log2,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    MEANS: tl.constexpr,
    LOG2_E: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one query block. The online softmax goes on from what reading found."""
    i_block = tl.program_id(0) // parts
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    p_start = starts + i_b * stride_sb + i_h * stride_sh + i_block
    rows = tl.load(p_start) + (tl.program_id(0) % parts) * ROWS + tl.arange(0, ROWS)
    there = rows < tl.load(p_start + 1)
    lanes = tl.arange(0, BLOCK_D)
    inside = there[:, None] & (lanes < DIM)[None, :]
    wide = rows.to(tl.int64)[:, None]
    head = i_b * heads + i_h
    p_out = out + i_b * stride_ob + i_h * stride_oh + wide * stride_os + lanes[None, :] * stride_od
    p_q = q + i_b * stride_qb + i_h * stride_qh + wide * stride_qs + lanes[None, :] * stride_qd
    p_weight = coarse + (head * blocks + i_block) * means
    b_q = tl.load(p_q, mask=inside, other=0.0)
    acc = tl.load(p_out, mask=inside, other=0.0).to(tl.float32)
    top = tl.load(lse + head * tokens + rows, mask=there, other=float("-inf")) * LOG2_E
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    for first in range(0, means, MEANS):
        mean = first + tl.arange(0, MEANS)
        known = mean < means
        p_mean = (head * means + mean)[:, None] * DIM + lanes[None, :]
        b_k = tl.load(keys + p_mean, mask=known[:, None] & (lanes < DIM)[None, :], other=0.0)
        b_v = tl.load(values + p_mean, mask=known[:, None] & (lanes < DIM)[None, :], other=0.0)
        weight = tl.load(p_weight + mean, mask=known, other=float("-inf")) * LOG2_E
        scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2 + weight[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing yet: -inf minus -inf
        fade = tl.exp2(top - safe)
        p = tl.exp2(scores - safe[:, None])
        acc = acc * fade[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mix_kernel(
    out, above, mixed_in, starts,
    stride_ob, stride_oh, stride_os, stride_od,
    stride_sb, stride_sh,
    heads, blocks,
    STEPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the rows of one query block of one head. Offsets are int64: tensors may pass 2^31 elements."""
    i_block = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    p_start = starts + i_b * stride_sb + i_h * stride_sh + i_block
    low = tl.load(p_start)
    high = tl.load(p_start + 1)
    row = (i_b * heads + i_h) * blocks + i_block
    lanes = tl.arange(0, BLOCK_D)
    times = tl.load(above + row)
    share = tl.where(times == times, 1.0 / (1.0 + tl.exp(-times)), 0.0)  # -inf minus -inf: nothing stands in
    more = tl.load(mixed_in + row * DIM + lanes, mask=lanes < DIM, other=0.0)
    head = out + i_b * stride_ob + i_h * stride_oh
    for step in range(STEPS):
        rows = low + step * ROWS + tl.arange(0, ROWS)
        inside = (rows < high)[:, None] & (lanes < DIM)[None, :]
        p_rows = head + rows.to(tl.int64)[:, None] * stride_os + lanes[None, :] * stride_od
        b_out = tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
        mixed = (1.0 - share) * b_out + share * more[None, :]
        tl.store(p_rows, mixed.to(out.dtype.element_ty), mask=inside)
