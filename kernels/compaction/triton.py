"""Compaction in Triton: one program for each list, a running sum says where an entry goes."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import lead_strides

ENTRIES = 256  # of a list, read at once


def why_not(counts: Tensor) -> str | None:
    """Why this kernel cannot run, or None."""
    if counts.device.type != "cuda" and isinstance(compact_lists_kernel, triton.JITFunction):
        return f"the plan is on {counts.device}; it runs on CUDA devices."
    return None


def compact_lists(
    counts: Tensor, indices: Tensor, needed: Tensor, forced: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the current stream. Arguments and results as in `reference.compact_lists`."""
    batch, heads, n_q, width = needed.shape
    needed = needed.contiguous()
    new_counts = torch.empty(batch, heads, n_q, dtype=torch.int32, device=counts.device)
    new_indices = torch.empty(batch, heads, n_q, width, dtype=torch.int32, device=counts.device)
    with torch.cuda.device(counts.device) if counts.is_cuda else nullcontext():
        compact_lists_kernel[(n_q, heads, batch)](
            *(counts, indices, needed, needed if forced is None else forced.contiguous()),
            *(new_counts, new_indices, heads, n_q, 0 if forced is None else forced.shape[1], width),
            *(*lead_strides(counts), *lead_strides(indices), indices.stride(2)),
            FORCED=forced is not None,
            ENTRIES=ENTRIES,
            num_warps=1,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return new_counts, new_indices


UNSPECIALIZED = (
    *("heads", "n_q", "n_k", "width"),
    *("stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_iq"),
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def compact_lists_kernel(
    counts, indices, needed, forced, new_counts, new_indices,
    heads, n_q, n_k, width,
    stride_cb, stride_ch,
    stride_ib, stride_ih, stride_iq,
    FORCED: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: the list of one query block of one head."""
    i_block = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    row = (i_b * heads + i_h) * n_q + i_block
    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_block)
    p_list = indices + i_b * stride_ib + i_h * stride_ih + i_block.to(tl.int64) * stride_iq
    kept = tl.zeros([], dtype=tl.int32)
    for first in range(0, count, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        listed = slot < count
        entry = tl.load(p_list + slot, mask=listed, other=0)
        taken = tl.load(needed + row * width + slot, mask=listed, other=0) != 0
        if FORCED:
            must = tl.load(forced + i_block.to(tl.int64) * n_k + entry, mask=listed, other=0)
            taken = taken | (must != 0)
        place = kept + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(new_indices + row * width + place, entry, mask=taken)
        kept += tl.sum(taken.to(tl.int32), 0)
    tl.store(new_counts + row, kept)
