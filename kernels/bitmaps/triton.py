"""Bitmaps in Triton: one program for each row."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import lead_strides

ENTRIES = 64  # of a list, read at once
WORDS = 8  # of a bitmap, taken apart at once


def why_not(x: Tensor) -> str | None:
    """Why these kernels cannot run, or None."""
    if x.device.type != "cuda" and isinstance(pack_kernel, triton.JITFunction):
        return f"the plan is on {x.device}; it runs on CUDA devices."
    return None


def pack_lists(counts: Tensor, indices: Tensor, n_k: int) -> Tensor:
    """Launch on the current stream. Arguments and result as in `reference.pack_lists`."""
    batch, heads, n_q, _ = indices.shape
    words = triton.cdiv(n_k, 32)
    bits = torch.empty(batch, heads, n_q, words, dtype=torch.int32, device=counts.device)
    with torch.cuda.device(counts.device) if counts.is_cuda else nullcontext():
        pack_kernel[(n_q, heads, batch)](
            *(counts, indices, bits, heads, n_q, words),
            *(*lead_strides(counts), *lead_strides(indices), indices.stride(2)),
            BLOCK_W=triton.next_power_of_2(words),
            ENTRIES=ENTRIES,
            num_warps=1,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return bits


def unpack_lists(bits: Tensor, n_k: int) -> tuple[Tensor, Tensor]:
    """Launch on the current stream. Arguments and results as in `reference.unpack_lists`."""
    bits = bits.contiguous()
    batch, heads, n_q, words = bits.shape
    counts = torch.empty(batch, heads, n_q, dtype=torch.int32, device=bits.device)
    indices = torch.empty(batch, heads, n_q, n_k, dtype=torch.int32, device=bits.device)
    with torch.cuda.device(bits.device) if bits.is_cuda else nullcontext():
        unpack_kernel[(batch * heads * n_q,)](
            *(bits, counts, indices, n_k, words),
            WORDS=WORDS,
            num_warps=1,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return counts, indices


PACK_UNSPECIALIZED = (
    *("heads", "n_q", "words"),
    *("stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_iq"),
)


@triton.jit(do_not_specialize=PACK_UNSPECIALIZED)
def pack_kernel(
    counts, indices, bits,
    heads, n_q, words,
    stride_cb, stride_ch,
    stride_ib, stride_ih, stride_iq,
    BLOCK_W: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: the list of one query block of one head, all of its words side by side."""
    i_block = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    row = (i_b * heads + i_h) * n_q + i_block
    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_block)
    p_list = indices + i_b * stride_ib + i_h * stride_ih + i_block.to(tl.int64) * stride_iq
    word = tl.arange(0, BLOCK_W)
    packed = tl.zeros([BLOCK_W], dtype=tl.int32)
    for first in range(0, count, ENTRIES):
        slot = first + tl.arange(0, ENTRIES)
        entry = tl.load(p_list + slot, mask=slot < count, other=-1)
        bit = tl.where(entry >= 0, 1 << (entry & 31), 0)
        own = (entry >> 5)[None, :] == word[:, None]
        packed += tl.sum(tl.where(own, bit[None, :], 0), 1)  # bits of one word differ: a sum is an OR
    tl.store(bits + row * words + word, packed, mask=word < words)


@triton.jit(do_not_specialize=("n_k", "words"))
def unpack_kernel(bits, counts, indices, n_k, words, WORDS: tl.constexpr):
    """One program: one row; a running sum says where a block's number goes."""
    row = tl.program_id(0).to(tl.int64)
    kept = tl.zeros([], dtype=tl.int32)
    for first in range(0, words, WORDS):
        block = first * 32 + tl.arange(0, WORDS * 32)
        word = tl.load(bits + row * words + (block >> 5), mask=block < n_k, other=0)
        taken = (word >> (block & 31)) & 1
        place = kept + tl.cumsum(taken, 0) - 1
        tl.store(indices + row * n_k + place, block, mask=taken != 0)
        kept += tl.sum(taken, 0)
    tl.store(counts + row, kept)
