"""Counting in Triton: one program for each list of the plan."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import BlockPlan, lead_strides

ENTRIES = 128  # of a list, read at once


def why_not(plan: BlockPlan) -> str | None:
    """Why this kernel cannot run, or None."""
    if plan.device.type != "cuda" and isinstance(count_pairs_kernel, triton.JITFunction):
        return f"the plan is on {plan.device}; it runs on CUDA devices."
    return None


def count_pairs(plan: BlockPlan) -> Tensor:
    """Launch the kernel on the current stream. Arguments and result as in `api.count_pairs`."""
    batch, heads = plan.lead
    pairs = torch.zeros((), dtype=torch.int64, device=plan.device)
    with torch.cuda.device(plan.device) if pairs.is_cuda else nullcontext():
        count_pairs_kernel[(plan.n_q, heads, batch)](
            *(plan.counts, plan.indices, plan.q_starts, plan.k_starts, pairs),
            *(*lead_strides(plan.counts), *lead_strides(plan.indices), plan.indices.stride(2)),
            *(*lead_strides(plan.q_starts), *lead_strides(plan.k_starts)),
            ENTRIES=ENTRIES,
            num_warps=1,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return pairs


UNSPECIALIZED = (
    *("stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_iq"),
    *("stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh"),
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def count_pairs_kernel(
    counts, indices, q_starts, k_starts, pairs,
    stride_cb, stride_ch,
    stride_ib, stride_ih, stride_iq,
    stride_qsb, stride_qsh,
    stride_ksb, stride_ksh,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: the list of one query block. Integers, so that atomic adding gives the same sum in any order."""
    i_block = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_block)
    p_list = indices + i_b * stride_ib + i_h * stride_ih + i_block.to(tl.int64) * stride_iq
    p_key = k_starts + i_b * stride_ksb + i_h * stride_ksh
    read = tl.zeros([ENTRIES], dtype=tl.int32)
    for first in range(0, count, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        listed = slot < count
        entry = tl.load(p_list + slot, mask=listed, other=0)
        size = tl.load(p_key + entry + 1, mask=listed, other=0) - tl.load(p_key + entry, mask=listed, other=0)
        read += size
    p_query = q_starts + i_b * stride_qsb + i_h * stride_qsh + i_block
    rows = (tl.load(p_query + 1) - tl.load(p_query)).to(tl.int64)
    tl.atomic_add(pairs, tl.sum(read, 0).to(tl.int64) * rows, sem="relaxed")
