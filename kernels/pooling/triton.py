"""Mean pooling in Triton: one program for each block of each head, one pass over the input."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import lead_strides

ROWS = 64  # tokens of a block summed at once
LARGEST_HEAD = 512


def why_not(x: Tensor) -> str | None:
    """Why this kernel cannot run, or None. x: `[B, S, H, D]`."""
    if x.device.type != "cuda" and isinstance(block_means_kernel, triton.JITFunction):
        return f"the tensors are on {x.device}; it runs on CUDA devices."
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {x.dtype}."
    if x.shape[3] > LARGEST_HEAD:
        return f"head size {x.shape[3]} is above {LARGEST_HEAD}."
    return None


def block_means(
    x: Tensor, starts: Tensor, max_block: int, of: str = "values", center: Tensor | None = None
) -> Tensor:
    """Launch the kernel on the current stream. Arguments and result as in `api.run`."""
    batch, _, heads, dim = x.shape
    blocks = starts.shape[2] - 1
    out = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        block_means_kernel[(blocks, heads, batch)](
            *(x, starts, out, out if center is None else center.float().contiguous()),
            *x.stride(),
            *lead_strides(starts),
            *(heads, blocks, 1 if center is None else center.shape[2]),
            OF=of,
            CENTERED=center is not None,
            STEPS=max(1, triton.cdiv(max_block, ROWS)),
            DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return out


# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
# Strides of rows of D numbers are not among them: that all of them are multiples of 16 lets a thread move 16 bytes.
UNSPECIALIZED = ("stride_sb", "stride_sh", "heads", "blocks", "centers")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def block_means_kernel(
    x, starts, out, center,
    stride_xb, stride_xs, stride_xh, stride_xd,
    stride_sb, stride_sh,
    heads, blocks, centers,
    OF: tl.constexpr,
    CENTERED: tl.constexpr,
    STEPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the mean of one block of one head. Offsets are int64: tensors may pass 2^31 elements."""
    i_block = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    p_start = starts + i_b * stride_sb + i_h * stride_sh + i_block
    low = tl.load(p_start)
    high = tl.load(p_start + 1)
    lanes = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    head = x + i_b * stride_xb + i_h * stride_xh
    if CENTERED:
        p_center = center + ((i_b * heads + i_h) * centers + tl.minimum(i_block, centers - 1)) * DIM
        middle = tl.load(p_center + lanes, mask=lanes < DIM, other=0.0)
    for step in range(STEPS):
        rows = low + step * ROWS + tl.arange(0, ROWS)
        inside = (rows < high)[:, None] & (lanes < DIM)[None, :]
        place = rows.to(tl.int64)[:, None] * stride_xs + lanes[None, :] * stride_xd
        values = tl.load(head + place, mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            values = tl.where(inside, values - middle[None, :], 0.0)
        if OF == "deviations":
            values = tl.abs(values)
        if OF == "directions":
            length = tl.sqrt(tl.sum(values * values, 1))
            values = values / tl.maximum(length, 1e-30)[:, None]
        total += tl.sum(values, 0)
    mean = total / tl.maximum(high - low, 1).to(tl.float32)
    p_out = out + ((i_b * heads + i_h) * blocks + i_block) * DIM + lanes
    tl.store(p_out, mean, mask=lanes < DIM)
