"""Launching the Triton kernels of the backward: dq by query blocks, then dk and dv by key blocks, then sums of chunks.

`query_kernel` walks the plan's lists and writes the rows' `delta` on the way; `key_kernel` walks the inverse's lists.
Neither adds to what another program writes: columns that were cut go to a workspace, chunk by chunk, and are summed in
their order. So equal inputs give equal gradients, bit for bit.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dit_accel.kernels.block_sparse.triton import capability_of, interpreting, padded_head, why_not
from dit_accel.kernels.inversion import invert_plan
from dit_accel.plan import BlockPlan, lead_strides

from .key_kernel import key_gradients_kernel, sum_chunks_kernel
from .query_kernel import query_gradients_kernel

__all__ = ["KEYS", "QUERIES", "Config", "config_for", "differentiate", "why_not"]

SUM_ROWS = 32  # of a key block, in one program that sums chunks


@dataclass(frozen=True)
class Config:
    """A compiled shape of one of the two kernels."""

    rows: int  # that a program keeps: query rows for dq, key rows for dk and dv
    step: int  # rows of the other side that it reads at once
    warps: int
    stages: int


# For 16-bit types: by whether the chip has 227 KB of shared memory a program (others 99), padded head size, and rows.
# Chosen by compiling alone: no spills in the loops, and two tiles on their way, or room for a second program.
QUERIES = {
    (True, 64, 128): Config(128, 64, 8, 3),
    (True, 64, 64): Config(64, 64, 4, 3),
    (True, 128, 128): Config(128, 64, 8, 3),
    (True, 128, 64): Config(64, 64, 4, 2),
    (False, 64, 128): Config(128, 64, 8, 3),
    (False, 64, 64): Config(64, 64, 4, 3),
    (False, 128, 128): Config(64, 32, 4, 3),
    (False, 128, 64): Config(64, 32, 4, 3),
}
KEYS = QUERIES | {
    (False, 64, 128): Config(64, 64, 4, 3),
}
ROOMY = (90, 100)  # capabilities with 227 KB


def config_for(
    table: dict, head: int, dtype: torch.dtype, longest: int, capability: int | None = None
) -> Config:
    """The configuration of a kernel.

    Args:
        table: `QUERIES` for dq, where q, dout and one sum stay and k and v pass by; `KEYS` for dk and dv, where k, v
            and two sums stay and q and dout pass by.
        head: head size.
        longest: no block of the side that stays is longer.
        capability: of the chip, such as 90.
    """
    padded = padded_head(head)
    if dtype == torch.float32:
        # Full-precision products run on the scalar units: small tiles keep everything in registers.
        return Config(16, 16, 8, 1) if padded > 64 else Config(32, 16, 8, 1)
    if padded > 128:
        return Config(32, 32, 8, 1)
    return table[capability in ROOMY, max(64, padded), 64 if longest <= 64 else 128]


def differentiate(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on the current stream. Arguments and results as in `reference.differentiate`."""
    batch, heads, n_rows, head = q.shape
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta = torch.empty(batch, heads, n_rows, dtype=torch.float32, device=q.device)
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    inverse = invert_plan(plan, impl="triton")
    chunks = torch.empty(
        *(batch, heads, inverse.slots, 2, plan.max_k_block, head), dtype=torch.float32, device=q.device
    )
    known = dict(
        HEAD=head,
        BLOCK_D=padded_head(head),
        # The interpreter multiplies the bit patterns of bfloat16 operands, silently.
        UPCAST=interpreting() and q.dtype == torch.bfloat16,
        enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
    )
    capability = capability_of(q.device)
    scales = scale, scale * math.log2(math.e)
    offsets = (*lead_strides(plan.q_starts), *lead_strides(plan.k_starts))
    columns = (inverse.lists, inverse.items)
    column_strides = [x for t in columns for x in (*lead_strides(t), t.stride(2))]
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        config = config_for(QUERIES, head, q.dtype, plan.max_q_block, capability)
        pieces = max(1, triton.cdiv(plan.max_q_block, config.rows))
        query_gradients_kernel[(plan.n_q * pieces, heads, batch)](
            *(grad_out, grad_lse, q, k, v, out, lse, dq, delta),
            *(plan.counts, plan.indices, plan.q_starts, plan.k_starts),
            *(n for x in (grad_out, q, k, v, out, dq) for n in x.stride()),
            *(*lead_strides(plan.counts), *lead_strides(plan.indices), plan.indices.stride(2)),
            *(*offsets, *scales, pieces, n_rows, heads),
            ROWS=config.rows,
            COLUMNS=config.step,
            STEPS=max(1, triton.cdiv(plan.max_k_block, config.step)),
            STAGES=config.stages,
            **known,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        config = config_for(KEYS, head, q.dtype, plan.max_k_block, capability)
        pieces = max(1, triton.cdiv(plan.max_k_block, config.rows))
        leads, n_items = batch * heads, inverse.items.shape[2]
        key_gradients_kernel[(n_items * leads * pieces,)](
            *(grad_out, delta, q, k, v, lse, dk, dv, chunks),
            *(*columns, plan.q_starts, plan.k_starts),
            *(n for x in (grad_out, q, k, v, dk, dv) for n in x.stride()),
            *(*column_strides, *offsets, *scales, pieces, n_rows),
            *(heads, leads, n_items, inverse.slots, plan.max_k_block),
            ROWS=config.step,
            COLUMNS=config.rows,
            STEPS=max(1, triton.cdiv(plan.max_q_block, config.step)),
            STAGES=config.stages,
            **known,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if inverse.slots:
            pieces = max(1, triton.cdiv(plan.max_k_block, SUM_ROWS))
            sum_chunks_kernel[(inverse.slots * pieces, heads, batch)](
                *(chunks, dk, dv, inverse.items, plan.k_starts),
                *(*dk.stride(), *dv.stride(), *lead_strides(inverse.items), inverse.items.stride(2)),
                *(*lead_strides(plan.k_starts), pieces, heads, inverse.slots, plan.max_k_block),
                HEAD=head,
                BLOCK_D=padded_head(head),
                COLUMNS=SUM_ROWS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return dq, dk, dv
