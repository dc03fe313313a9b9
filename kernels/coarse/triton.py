"""Mixing with block means in Triton: one program for each query block of each head, one pass over the output."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import lead_strides

ROWS = 32  # rows of a block at once


def why_not(out: Tensor) -> str | None:
    """Why this kernel cannot run, or None. out: `[B, H, S, D]`."""
    if out.device.type != "cuda" and isinstance(mix_kernel, triton.JITFunction):
        return f"the tensors are on {out.device}; it runs on CUDA devices."
    if out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {out.dtype}."
    return None


def mix(
    out: Tensor,
    lse: Tensor,
    total: Tensor,
    rest: Tensor | None,
    mixed_in: Tensor,
    starts: Tensor,
    max_block: int,
) -> None:
    """Launch the kernel on the current stream. Arguments as in `reference.mix`."""
    batch, heads, _, dim = out.shape
    blocks = starts.shape[2] - 1
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        mix_kernel[(blocks, heads, batch)](
            *(out, lse.contiguous(), total.contiguous(), total if rest is None else rest.contiguous()),
            *(mixed_in.contiguous(), starts),
            *out.stride(),
            *lead_strides(starts),
            *(heads, blocks, out.shape[2]),
            MEASURED=rest is None,
            STEPS=max(1, triton.cdiv(max_block, ROWS)),
            DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )


# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
UNSPECIALIZED = ("stride_ob", "stride_oh", "stride_sb", "stride_sh", "heads", "blocks", "tokens")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mix_kernel(
    out, lse, total, rest, mixed_in, starts,
    stride_ob, stride_oh, stride_os, stride_od,
    stride_sb, stride_sh,
    heads, blocks, tokens,
    MEASURED: tl.constexpr,
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
    stands_in = tl.load(total + row)
    empty = stands_in == float(
        "-inf"
    )  # nothing stands in: rows stay as they are, also where nothing was read
    stands_in = tl.where(empty, 0.0, stands_in)
    more = tl.load(mixed_in + row * DIM + lanes, mask=lanes < DIM, other=0.0)
    if not MEASURED:
        weight = tl.full([ROWS], 0.0, tl.float32) + tl.load(rest + row)
    head = out + i_b * stride_ob + i_h * stride_oh
    for step in range(STEPS):
        rows = low + step * ROWS + tl.arange(0, ROWS)
        inside = (rows < high)[:, None] & (lanes < DIM)[None, :]
        p_rows = head + rows.to(tl.int64)[:, None] * stride_os + lanes[None, :] * stride_od
        b_out = tl.load(p_rows, mask=inside, other=0.0).to(tl.float32)
        if MEASURED:
            weight = tl.load(lse + (i_b * heads + i_h) * tokens + rows, mask=rows < high, other=0.0)
        share = tl.where(empty, 0.0, 1.0 / (1.0 + tl.exp(weight - stands_in)))[:, None]
        mixed = (1.0 - share) * b_out + share * more[None, :]
        tl.store(p_rows, mixed.to(out.dtype.element_ty), mask=inside)
