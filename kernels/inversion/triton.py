"""Inversion in Triton: the plan as a bitmap, whose columns are read 32 at a time; then one program a head cuts them.

A running sum over the rows of a column says where a query block's number goes, so lists ascend and nothing races. The
bitmap is an eighth of a byte a pair of blocks, read once.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.bitmaps import triton as bitmaps

from .inverse import FIELDS, SHORTEST, bounds, most_chunks

ROWS = 64  # query blocks, read at once


def why_not(counts: Tensor) -> str | None:
    """Why these kernels cannot run, or None."""
    if counts.device.type != "cuda" and isinstance(read_columns_kernel, triton.JITFunction):
        return f"the plan is on {counts.device}; it runs on CUDA devices."
    return None


def invert_lists(counts: Tensor, indices: Tensor, n_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on the current stream. Arguments and results as in `reference.invert_lists`."""
    batch, heads, n_q = counts.shape
    n_items, _ = bounds(n_q, n_k)
    bits = bitmaps.pack_lists(counts, indices, n_k)
    words, known = bits.shape[3], dict(dtype=torch.int32, device=counts.device)
    read = torch.empty(batch, heads, n_k, **known)
    lists = torch.empty(batch, heads, n_k, n_q, **known)
    items = torch.empty(batch, heads, n_items, FIELDS, **known)
    with torch.cuda.device(counts.device) if counts.is_cuda else nullcontext():
        read_columns_kernel[(words, batch * heads)](
            *(bits, read, lists, n_q, n_k, words),
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
        cut_columns_kernel[(batch * heads,)](
            *(read, items, n_k, n_items, most_chunks(n_k)),
            SHORTEST=SHORTEST,
            FIELDS=FIELDS,
            BLOCK_K=triton.next_power_of_2(n_k),
            BLOCK_W=triton.next_power_of_2(n_items),
            num_warps=4,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return read, lists, items


READ_UNSPECIALIZED = ("n_q", "n_k", "words")
CUT_UNSPECIALIZED = ("n_k", "n_items", "most")


@triton.jit(do_not_specialize=READ_UNSPECIALIZED)
def read_columns_kernel(bits, counts, lists, n_q, n_k, words, ROWS: tl.constexpr):
    """One program: 32 key blocks of one head."""
    i_word = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    bit = tl.arange(0, 32)
    key = i_word * 32 + bit
    key_ok = key < n_k
    p_list = lists + (i_h * n_k + key) * n_q
    kept = tl.zeros([32], dtype=tl.int32)
    for first in range(0, n_q, ROWS):
        row = first + tl.arange(0, ROWS)
        word = tl.load(bits + (i_h * n_q + row) * words + i_word, mask=row < n_q, other=0)
        taken = (word[:, None] >> bit[None, :]) & 1
        place = kept[None, :] + tl.cumsum(taken, 0) - 1
        tl.store(p_list[None, :] + place, row[:, None] + 0 * place, mask=(taken != 0) & key_ok[None, :])
        kept += tl.sum(taken, 0)
    tl.store(counts + i_h * n_k + key, kept, mask=key_ok)


@triton.jit(do_not_specialize=CUT_UNSPECIALIZED)
def cut_columns_kernel(
    counts, items,
    n_k, n_items, most,
    SHORTEST: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: the items of one head."""
    i_h = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, BLOCK_K)
    key_ok = key < n_k
    count = tl.load(counts + i_h * n_k + key, mask=key_ok, other=0)
    longest = tl.maximum((tl.sum(count, 0) + most - 1) // most, SHORTEST)
    parts = tl.maximum((count + longest - 1) // longest, 1)
    cut = key_ok & (parts > 1)
    slots = tl.where(cut, parts, 0)
    used = tl.sum(slots, 0)
    whole = (key_ok & (parts == 1)).to(tl.int32)
    place = tl.where(cut, tl.cumsum(slots, 0) - slots, used + tl.cumsum(whole, 0) - 1)
    step = (count + parts - 1) // parts

    p_item = items + (i_h * n_items + place) * FIELDS
    for i in range(0, tl.max(tl.where(key_ok, parts, 0), 0)):
        there = key_ok & (i < parts)
        first = i * step
        tl.store(p_item, key, mask=there)
        tl.store(p_item + 1, first, mask=there)
        tl.store(p_item + 2, tl.minimum(step, count - first), mask=there)
        tl.store(p_item + 3, parts, mask=there)
        p_item += FIELDS
    rest = used + tl.sum(whole, 0) + tl.arange(0, BLOCK_W)
    p_rest = items + (i_h * n_items + rest) * FIELDS
    tl.store(p_rest, -1 + 0 * rest, mask=rest < n_items)
    for field in tl.static_range(1, FIELDS):
        tl.store(p_rest + field, 0 * rest, mask=rest < n_items)
