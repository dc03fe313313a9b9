"""Block selection in Triton: one program for each row of scores, no sort.

A row's scores become integers of the same order. The value of the last block that the budget takes is found bit by
bit, from the highest: a bit stays set while enough blocks lie at or above it (radix select; 32 counts of the row, all
in registers). What lies above it is taken, then blocks of just that value from the lowest index on, and a running sum
of what is taken says where in the ascending list each of them goes.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 4096  # key blocks of a row


def why_not(scores: Tensor) -> str | None:
    """Why this kernel cannot run, or None. scores: `[B, H, Nq, Nk]`."""
    if scores.device.type != "cuda" and isinstance(select_blocks_kernel, triton.JITFunction):
        return f"the tensors are on {scores.device}; it runs on CUDA devices."
    if scores.shape[3] > LONGEST:
        return f"{scores.shape[3]} key blocks are more than {LONGEST}."
    return None


def select_blocks(
    scores: Tensor,
    forced: Tensor | None,
    least: int | Tensor,
    top_p: float | Tensor | None,
    shares: Tensor | None,
    above: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the current stream. Arguments and results as in `api.select_blocks`."""
    batch, heads, n_q, n_k = scores.shape
    scores = scores.contiguous()
    shares = scores if shares is None else shares.contiguous()
    there = [isinstance(x, Tensor) for x in (least, top_p, above)]
    width = least if top_p is None and forced is None and above is None and not there[0] else n_k
    counts = torch.empty(batch, heads, n_q, dtype=torch.int32, device=scores.device)
    indices = torch.empty(batch, heads, n_q, width, dtype=torch.int32, device=scores.device)
    padded = max(16, triton.next_power_of_2(n_k))
    with torch.cuda.device(scores.device) if scores.is_cuda else nullcontext():
        select_blocks_kernel[(n_q, batch * heads)](
            *(scores, scores if forced is None else forced.contiguous(), shares, counts, indices),
            *(n_q, n_k, width, least),
            *(x if isinstance(x, Tensor) else 0.0 if x is None else float(x) for x in (top_p, above)),
            LEAST_THERE=there[0],
            TOP_P_THERE=there[1],
            ABOVE_THERE=there[2],
            FORCED=forced is not None,
            TOP_P=top_p is not None,
            ABOVE=above is not None,
            PADDED=padded,
            num_warps=warps_for(padded),
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return counts, indices


def warps_for(padded: int) -> int:
    """One warp keeps every count within its registers; longer rows need more of them."""
    return 1 if padded <= 512 else 4


UNSPECIALIZED = ("n_q", "n_k", "width", "least", "top_p", "above")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_blocks_kernel(
    scores, forced, shares, counts, indices,
    n_q, n_k, width, least, top_p, above,
    LEAST_THERE: tl.constexpr,
    TOP_P_THERE: tl.constexpr,
    ABOVE_THERE: tl.constexpr,
    FORCED: tl.constexpr,
    TOP_P: tl.constexpr,
    ABOVE: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """One program: the list of one query block of one head. Budgets that are `THERE` are pointers."""
    i_q = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * n_q + i_q
    columns = tl.arange(0, PADDED)
    present = columns < n_k
    value = tl.load(scores + row * n_k + columns, mask=present, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 is equal to 0.0, its bits are not
    bits = value.to(tl.int32, bitcast=True)
    # Integers of the same order from 1 on: 0 is left for what is not there.
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000001
    if LEAST_THERE:
        least = tl.minimum(tl.maximum(tl.load(least), 1), n_k)
    if TOP_P_THERE:
        top_p = tl.load(top_p)
    count = tl.zeros([], dtype=tl.int32) + least
    if FORCED:
        must = tl.load(forced + i_q.to(tl.int64) * n_k + columns, mask=present, other=0) != 0
        key = tl.where(must, 0x1FFFFFFFF, key)
        count = tl.maximum(count, tl.sum(must.to(tl.int32), 0))
    if ABOVE:
        if ABOVE_THERE:
            above = tl.load(above)
        wanted = value >= above
        if FORCED:
            wanted = wanted | must
        count = tl.maximum(count, tl.sum((wanted & present).to(tl.int32), 0))
    key = tl.where(present, key, 0)

    if TOP_P:
        share = tl.load(shares + row * n_k + columns, mask=present, other=0.0)
        floor = tl.zeros([], dtype=tl.int64)
        for bit in range(33):
            guess = floor | (tl.full([], 1, tl.int64) << (32 - bit))
            reached = tl.sum(tl.where(key >= guess, share, 0.0), 0) >= top_p
            floor = tl.where(reached, guess, floor)
        # `floor` is the lowest key that the mass needs, or 0 if all of it is too little.
        above = key > floor
        level = (key == floor) & present
        mass = tl.sum(tl.where(above, share, 0.0), 0) + tl.cumsum(tl.where(level, share, 0.0), 0)
        short = tl.sum((level & (mass < top_p)).to(tl.int32), 0)
        needed = tl.sum((above & present).to(tl.int32), 0) + short + 1
        count = tl.maximum(count, tl.where(floor == 0, n_k, tl.minimum(needed, n_k)))

    last = tl.zeros([], dtype=tl.int64)
    for bit in range(33):
        guess = last | (tl.full([], 1, tl.int64) << (32 - bit))
        enough = tl.sum((key >= guess).to(tl.int32), 0) >= count
        last = tl.where(enough, guess, last)
    above = key > last
    level = (key == last) & present
    room = count - tl.sum(above.to(tl.int32), 0)
    taken = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(counts + row, count)
    tl.store(indices + row * width + place, columns, mask=taken)
    # Behind the count: the last block, in range and never read.
    tl.store(indices + row * width + columns, tl.zeros_like(columns) + n_k - 1,
             mask=(columns >= count) & (columns < width))  # fmt: skip
