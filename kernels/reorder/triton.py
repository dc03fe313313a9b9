"""Reordering in Triton: one program copies a few rows of one head, one side in order, the other where it is told."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import lead_strides

LARGEST_HEAD = 512
ELEMENTS = 4096  # that a program copies: eight vectors of 16 bytes for each thread in float32


def why_not(x: Tensor) -> str | None:
    """Why this kernel cannot run, or None. x: `[B, H, S, D]`."""
    if x.device.type != "cuda" and isinstance(copy_rows_kernel, triton.JITFunction):
        return f"the tensors are on {x.device}; it runs on CUDA devices."
    if x.shape[3] > LARGEST_HEAD:
        return f"head size {x.shape[3]} is above {LARGEST_HEAD}."
    return None


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """Launch the kernel on the current stream. Arguments and result as in `api.take_rows`."""
    return _copy(x, order, take=True)


def put_rows(x: Tensor, order: Tensor) -> Tensor:
    """Launch the kernel on the current stream. Arguments and result as in `api.put_rows`."""
    return _copy(x, order, take=False)


def rows_for(dim: int) -> int:
    """Rows of a program."""
    return min(256, max(8, ELEMENTS // triton.next_power_of_2(dim)))


def _copy(x: Tensor, order: Tensor, take: bool) -> Tensor:
    batch, heads, _, dim = x.shape
    count = order.shape[2]
    out = torch.empty(batch, heads, count, dim, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = rows_for(dim)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        copy_rows_kernel[(triton.cdiv(count, rows), heads, batch)](
            *(x, order, out),
            *x.stride(),
            *lead_strides(order),
            order.stride(2),
            *(heads, count),
            TAKE=take,
            DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            ROWS=rows,
            num_warps=4,
        )
    return out


# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
# Strides of rows of D numbers are not among them: that all of them are multiples of 16 lets a thread move 16 bytes.
UNSPECIALIZED = ("stride_ob", "stride_oh", "heads", "count")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def copy_rows_kernel(
    x, order, out,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_ob, stride_oh, stride_on,
    heads, count,
    TAKE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` entries of one head's order. Offsets are int64: tensors may pass 2^31 elements."""
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = entry < count
    told = tl.load(order + i_b * stride_ob + i_h * stride_oh + entry * stride_on, mask=inside, other=0)
    source = (told if TAKE else entry).to(tl.int64)
    target = (entry if TAKE else told).to(tl.int64)
    lanes = tl.arange(0, BLOCK_D)
    valid = inside[:, None] & (lanes < DIM)[None, :]
    p_x = x + i_b * stride_xb + i_h * stride_xh + source[:, None] * stride_xs + lanes[None, :] * stride_xd
    p_out = out + ((i_b * heads + i_h) * count + target[:, None]) * DIM + lanes[None, :]
    tl.store(p_out, tl.load(p_x, mask=valid), mask=valid)
