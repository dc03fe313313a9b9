"""Block-sparse attention forward for Hopper (sm_90) in Gluon: loading and computing warps, copies by TMA.

A program of twelve warps stays on its multiprocessor and takes one tile of 128 query rows after another. One warp
loads: it walks the tiles' lists and fills a ring of key and value blocks. Two groups of four warps compute, 64 query
rows each. Two overlaps keep the tensor cores busy while exponentials are taken, both from FlashAttention-3
(arXiv:2407.08608, sections 3.1 and 3.2):

- inside a group, `q k^T` of the next block is issued before the softmax of this one, and `p v` runs beneath it;
- between the groups, `go` lets one issue its products while the other takes its exponentials.

Tiles follow one another without a gap: the block after a tile's last one is the next tile's first, so its product and
its softmax run beneath the last `p v`, and what a short list would lose at its ends is not lost.

The arithmetic is that of `triton.py`. Rows behind a block's end are read with it, as part of a copy of fixed size, and
weighted with zero; only the end of the sequence is filled with zeros by the copy. So a NaN anywhere in the keys or
values of a head may reach any of its rows, as it does in dense attention. Heads and batch rows never mix.

Quantised operands (`kernels/quantize`) take the same way; `SCORES` and `VALUES` name their formats:

- Scores of 8-bit integers are counted from 1.5 * 2^23 up, where an integer's bits, read as a float, are its value: so
  they need no conversion, which would cost as much as the exponentials.
- A thread gets other columns of the scores than the product with 8-bit values takes from it. The keys of each sixteen
  are stored in the order (`quantize.KEY_ORDER`) in which both agree, and nothing moves between threads.
- Weights are scaled by 2^8 before they are rounded to fp8; the total is scaled alike.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.quantize import Quantised
from dit_accel.plan import BlockPlan, lead_strides

from .hopper_tiles import (
    LN_2,
    ROWS,
    UNSPECIALIZED,
    bulk_strides,
    copy_in,
    empty_rows,
    find_tile,
    finish,
    mask_behind,
    pin,
    why_no_bulk_copy,
)

FORMATS = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}
DTYPES = (torch.float16, torch.bfloat16)
HEADS = (64, 128)
KEY_ROWS = 128  # of one copy; no key block may be longer
CONSUMER_REGISTERS = 232
PRODUCER_REGISTERS = 40
SHARED = 227 * 1024  # bytes of a multiprocessor that one program may have

INTEGER_ZERO = gl.constexpr(0x4B400000)  # the bits of 1.5 * 2^23
FLOAT_ZERO = gl.constexpr(12582912.0)
WEIGHT_BITS = gl.constexpr(8.0)  # fp8 weights are scaled by two to this power


@dataclass(frozen=True)
class Config:
    """A compiled shape of the kernel."""

    stages: int  # key and value blocks in the ring: as many as shared memory holds, at most four


def config_for(
    head: int, scores: torch.dtype = torch.bfloat16, values: torch.dtype = torch.bfloat16
) -> Config:
    """The one configuration for this head size and these formats."""
    queries = 2 * ROWS.value * head * scores.itemsize
    block = KEY_ROWS * head * (scores.itemsize + values.itemsize)
    return Config(stages=min(4, (SHARED - queries - 1024) // block))


def why_not(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
    """Why this kernel cannot run, or None. q, k, v: `[B, H, S, D]`."""
    if q.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {q.dtype}."
    if q.shape[3] not in HEADS:
        return f"head size {q.shape[3]} is not one of {', '.join(map(str, HEADS))}."
    if plan.max_k_block > KEY_ROWS:
        return f"key blocks of up to {plan.max_k_block} tokens are longer than {KEY_ROWS}."
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}; it runs on CUDA devices."
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return f"{torch.cuda.get_device_name(q.device)} is not a Hopper GPU (sm_90)."
    return why_no_bulk_copy("q", q) or why_no_bulk_copy("k", k) or why_no_bulk_copy("v", v)


def block_sparse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the current stream. Arguments and results as in `reference.block_sparse`."""
    if scale <= 0:  # the maximum is taken before scaling
        q, scale = -q, max(-scale, 1e-30)
    return _launch(q, k, v, None, plan, scale, q)


def block_sparse_quantised(
    parts: Quantised, plan: BlockPlan, scale: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """As `block_sparse`, from quantised copies; `out` is shaped and typed as `like`. The scale must be positive."""
    return _launch(parts.q8, parts.k8, parts.v8, parts, plan, scale, like)


def _launch(
    q, k, v, parts: Quantised | None, plan: BlockPlan, scale: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    batch, heads, n_q, head = like.shape
    out = torch.empty_like(like)
    lse = torch.empty(batch, heads, n_q, dtype=torch.float32, device=q.device)
    counts, indices = plan.counts.contiguous(), plan.indices.contiguous()
    rows, key_rows = ROWS.value, KEY_ROWS
    fp8_values = v.dtype == torch.float8_e4m3fn
    pieces = max(1, -(-plan.max_q_block // (2 * rows)))
    tiles = batch * heads * plan.n_q * pieces
    scales = (parts.q_scale, parts.k_scale, parts.v_scale, parts.shift) if parts else (lse,) * 4  # not read
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    with torch.cuda.device(q.device):
        block_sparse_kernel[(min(tiles, processors),)](
            _describe(q, (rows, head)),
            _describe(k, (key_rows, head)),
            _describe(v, (head, key_rows) if fp8_values else (key_rows, head)),
            *(out, lse, counts, indices, plan.q_starts, plan.k_starts, *scales),
            *(tiles, plan.n_q, plan.n_k, pieces, heads, n_q, scale * math.log2(math.e)),
            *(*lead_strides(counts), indices.shape[3]),
            *(*lead_strides(plan.q_starts), *lead_strides(plan.k_starts)),
            *out.stride()[:3],
            HEAD=head,
            BLOCK_N=key_rows,
            STAGES=config_for(head, q.dtype, v.dtype).stages,
            SCALED=parts is not None,
            INTEGERS=q.dtype == torch.int8,
            FP8_VALUES=fp8_values,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS,
            PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return out, lse


@functools.lru_cache
def shared_layout(block: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a copied block `[1, 1, *block]` lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, *block], FORMATS[dtype])


def _describe(x: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """All four dimensions: a copy that runs past the end of a head gets zeros, never the next head's tokens."""
    return TensorDescriptor(
        x, list(x.shape), [*bulk_strides(x), 1], [1, 1, *block], shared_layout(block, x.dtype)
    )


@gluon.jit
def _first_row(p_key, entry, BLOCK_N: gl.constexpr, SCALED: gl.constexpr):
    """Where the copy of a key block begins: quantised blocks are stored a fixed number of rows apart."""
    if SCALED:
        row = entry * BLOCK_N
    else:
        row = gl.load(p_key + entry)
    return row


@gluon.jit
def _load_tiles(
    q_desc, k_desc, v_desc, memory, plan, strides, result,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SCALED: gl.constexpr,
    FP8_VALUES: gl.constexpr,
):  # fmt: skip
    """The loading warp. `step` counts key blocks over all tiles, `turn` tiles that have any."""
    q_smem, k_smem, v_smem, q_full, q_free, k_full, v_full, free = memory
    counts, indices, q_starts, k_starts, tiles, n_q, _n_k, parts, heads = plan
    stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh = strides
    out, lse, n_tokens, _scale, stride_ob, stride_oh, stride_os = result
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_b, i_h, i_block, first, end, row, count = find_tile(
            tile, counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh
        )
        if count == 0:
            empty_rows(out, lse, i_b, i_h, first, end, heads, n_tokens, stride_ob, stride_oh, stride_os, HEAD)
        else:
            if SCALED:
                first = i_block * (2 * ROWS)
            p_list = indices + row * width
            p_key = k_starts + i_b.to(gl.int64) * stride_ksb + i_h.to(gl.int64) * stride_ksh
            low = _first_row(p_key, gl.load(p_list + count - 1), BLOCK_N, SCALED)
            for i in range(count):
                stage = step % STAGES
                phase = ((step // STAGES) & 1) ^ 1
                # The keys here before were multiplied before the values before them: known to be done, but once.
                mbarrier.wait(free.index(stage), phase, pred=step == STAGES)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                copy_in(k_desc, [i_b, i_h, low, 0], k_full.index(stage), k_smem.index(stage))
                if i == 0:  # after the keys, which may come while the tile before still uses its queries
                    for which in gl.static_range(2):
                        mbarrier.wait(q_free.index(which), (turn & 1) ^ 1)
                        mbarrier.expect(q_full.index(which), q_desc.block_type.nbytes)
                        copy_in(
                            q_desc,
                            [i_b, i_h, first + which * ROWS, 0],
                            q_full.index(which),
                            q_smem.index(which),
                        )
                    turn += 1
                # Read before waiting, so that the next copy need not wait for its address.
                ahead = _first_row(p_key, gl.load(p_list + gl.maximum(count - 2 - i, 0)), BLOCK_N, SCALED)
                mbarrier.wait(free.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                if FP8_VALUES:
                    copy_in(v_desc, [i_b, i_h, 0, low], v_full.index(stage), v_smem.index(stage))
                else:
                    copy_in(v_desc, [i_b, i_h, low, 0], v_full.index(stage), v_smem.index(stage))
                low = ahead
                step += 1


@gluon.jit
def _begin_scores(BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr, INTEGERS: gl.constexpr):
    """What a block's scores are added to."""
    if INTEGERS:
        scores = gl.full([ROWS, BLOCK_N], INTEGER_ZERO, gl.int32, LAYOUT)
    else:
        scores = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return scores


@gluon.jit
def _read_scores(scores, BLOCK_N: gl.constexpr, INTEGERS: gl.constexpr, FP8_VALUES: gl.constexpr):
    """Scores as floats (integers: with `FLOAT_ZERO` added), columns in the order of the tokens."""
    if INTEGERS:
        scores = scores.to(gl.float32, bitcast=True)
    if FP8_VALUES:
        scores = scores.reshape([ROWS, BLOCK_N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
        scores = scores.reshape([ROWS, BLOCK_N])
    return scores


@gluon.jit
def _soften(
    scores, top, total, length, factor,
    BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
    SCALED: gl.constexpr,
    INTEGERS: gl.constexpr,
    FP8_VALUES: gl.constexpr,
):  # fmt: skip
    """Weights `2^(factor s - m')` of one block, the new maximum and total, and the factor by which older parts fade.

    factor: one number, or with SCALED one for each row.
    """
    if length < BLOCK_N:
        scores = mask_behind(scores, length, BLOCK_N, 16 if FP8_VALUES else 8, LAYOUT)
    peak = gl.max(scores, 1)
    if INTEGERS:
        peak = peak - FLOAT_ZERO
    new_top = gl.maximum(top, peak * factor)
    # While a row has met no key its maximum is -inf, and -inf - -inf would be NaN.
    anchor = gl.where(new_top == -float("inf"), 0.0, new_top)
    below = -anchor
    if FP8_VALUES:
        below = below + WEIGHT_BITS
    if INTEGERS:
        below = below - FLOAT_ZERO * factor
    if SCALED:
        weights = gl.exp2(gl.fma(scores, factor[:, None], below[:, None]))
    else:
        weights = gl.exp2(gl.fma(scores, factor, below[:, None]))
    fade = gl.exp2(top - anchor)
    return weights, new_top, gl.fma(total, fade, gl.sum(weights, 1)), fade


@gluon.jit
def _row_factors(
    scales, i_b, i_h, i_block, heads, n_q, scale_log2, WHICH: gl.constexpr, LAYOUT: gl.constexpr
):
    """What each row's scores are multiplied by, beside the key block's scale."""
    q_scale, _k_scale, _v_scale, _shift = scales
    place = ((i_b * heads + i_h) * n_q + i_block) * (2 * ROWS) + WHICH * ROWS
    return gl.load(q_scale + place + gl.arange(0, ROWS, layout=LAYOUT)) * scale_log2


@gluon.jit
def _end_tile(
    acc, top, total, tile, heads, n_q, result, scales,
    WHICH: gl.constexpr,
    HEAD: gl.constexpr,
    LAYOUT: gl.constexpr,
    SCALED: gl.constexpr,
    FP8_VALUES: gl.constexpr,
):  # fmt: skip
    """Undo what quantisation did to total and lse, and write the rows."""
    i_b, i_h, i_block, first, end = tile
    _out, _lse, _n_tokens, scale_log2, _stride_ob, _stride_oh, _stride_os = result
    _q_scale, _k_scale, v_scale, shift = scales
    ROW: gl.constexpr = top.type.layout
    missing = gl.zeros([ROWS], gl.float32, ROW)
    if SCALED:
        place = ((i_b * heads + i_h) * n_q + i_block) * (2 * ROWS) + WHICH * ROWS
        missing = gl.load(shift + place + gl.arange(0, ROWS, layout=ROW)) * (scale_log2 * LN_2)
    if FP8_VALUES:
        missing = missing - WEIGHT_BITS * LN_2
    finish(
        acc, top, total, missing, first, end, i_b, i_h, heads, result, v_scale, WHICH, HEAD, LAYOUT, SCALED
    )


@gluon.jit
def _attend_tiles(
    memory, go, plan, strides, result, scales,
    WHICH: gl.constexpr,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SCALED: gl.constexpr,
    INTEGERS: gl.constexpr,
    FP8_VALUES: gl.constexpr,
):  # fmt: skip
    """A computing group: 64 rows of every tile that reads anything.

    One loop runs over the blocks of all tiles. `step` counts them, `turn` counts tiles; `next_*` is the tile after
    this one, looked up a tile ahead.
    """
    q_smem, k_smem, v_smem, q_full, q_free, k_full, v_full, free = memory
    counts, indices, q_starts, k_starts, tiles, n_q, n_k, parts, heads = plan
    stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh = strides
    out, _lse, _n_tokens, scale_log2, _stride_ob, _stride_oh, _stride_os = result
    _q_scale, k_scale, _v_scale, _shift = scales
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32 if SCALED else 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 32 if FP8_VALUES else 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 4 if FP8_VALUES else 2)
    blank = _begin_scores(BLOCK_N, S_LAYOUT, INTEGERS)
    C_LAYOUT: gl.constexpr = _read_scores(blank, BLOCK_N, INTEGERS, FP8_VALUES).type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, C_LAYOUT)
    weight_type: gl.constexpr = gl.float8e4nv if FP8_VALUES else out.dtype.element_ty
    b_q = q_smem.index(WHICH).reshape([ROWS, HEAD])
    tile = gl.program_id(0)
    i_b, i_h, i_block, first, end, row, count = find_tile(
        tile, counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh
    )
    while (count == 0) & (tile + gl.num_programs(0) < tiles):
        tile += gl.num_programs(0)
        i_b, i_h, i_block, first, end, row, count = find_tile(
            tile, counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh
        )
    if count > 0:
        next_tile = tile + gl.num_programs(0)
        next_b, next_h, next_block, next_first, next_end, next_row, next_count = find_tile(
            gl.minimum(next_tile, tiles - 1),
            counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh,
        )  # fmt: skip
        p_list = indices + row * width + count - 1
        p_key = k_starts + i_b.to(gl.int64) * stride_ksb + i_h.to(gl.int64) * stride_ksh
        entry = gl.load(p_list)
        length = gl.load(p_key + entry + 1) - gl.load(p_key + entry)
        factor = scale_log2
        rows_factor = scale_log2
        if SCALED:
            rows_factor = _row_factors(scales, i_b, i_h, i_block, heads, n_q, scale_log2, WHICH, ROW)
            factor = rows_factor * gl.load(k_scale + (i_b * heads + i_h) * n_k + entry)
        top = gl.full([ROWS], -float("inf"), gl.float32, ROW)
        total = gl.full([ROWS], 0.0, gl.float32, ROW)
        acc = gl.zeros([ROWS, HEAD], gl.float32, O_LAYOUT)
        mbarrier.wait(q_full.index(WHICH), 0)
        mbarrier.wait(k_full.index(0), 0)
        b_kt = k_smem.index(0).reshape([BLOCK_N, HEAD]).permute((1, 0))
        scores = warpgroup_mma(b_q, b_kt, blank, use_acc=INTEGERS, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(q_free.index(WHICH), count=1, pred=count == 1)
        scores = _read_scores(scores, BLOCK_N, INTEGERS, FP8_VALUES)
        weights, top, total, _fade = _soften(
            scores, top, total, length, factor, BLOCK_N, C_LAYOUT, SCALED, INTEGERS, FP8_VALUES
        )
        b_p = gl.convert_layout(weights.to(weight_type), P_LAYOUT)
        turn = 1
        step = 0
        i = 0
        if count == 1:
            while (next_count == 0) & (next_tile < tiles):
                next_tile += gl.num_programs(0)
                next_b, next_h, next_block, next_first, next_end, next_row, next_count = find_tile(
                    gl.minimum(next_tile, tiles - 1),
                    counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh,
                )  # fmt: skip
        while (i + 1 < count) | (next_tile < tiles):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            now = (step + 1) % STAGES
            now_phase = ((step + 1) // STAGES) & 1
            border = i + 1 == count
            last = (i_b, i_h, i_block, first, end)
            i += 1
            if border:
                i_b, i_h, i_block, first, end, count = (
                    next_b, next_h, next_block, next_first, next_end, next_count,
                )  # fmt: skip
                p_list = indices + next_row * width + count - 1
                p_key = k_starts + i_b.to(gl.int64) * stride_ksb + i_h.to(gl.int64) * stride_ksh
                i = 0
                if SCALED:
                    rows_factor = _row_factors(scales, i_b, i_h, i_block, heads, n_q, scale_log2, WHICH, ROW)
                next_tile += gl.num_programs(0)
                next_b, next_h, next_block, next_first, next_end, next_row, next_count = find_tile(
                    gl.minimum(next_tile, tiles - 1),
                    counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh,
                )  # fmt: skip
            entry = gl.load(p_list - i)
            length = gl.load(p_key + entry + 1) - gl.load(p_key + entry)
            if SCALED:
                key_factor = gl.load(k_scale + (i_b * heads + i_h) * n_k + entry)
            mbarrier.wait(go.index(WHICH), (step & 1) ^ (1 - WHICH))  # the first group goes first
            mbarrier.wait(q_full.index(WHICH), turn & 1, pred=border)
            mbarrier.wait(k_full.index(now), now_phase)
            b_kt = k_smem.index(now).reshape([BLOCK_N, HEAD]).permute((1, 0))
            blank = _begin_scores(BLOCK_N, S_LAYOUT, INTEGERS)
            scores = warpgroup_mma(b_q, b_kt, blank, use_acc=INTEGERS, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            if FP8_VALUES:
                b_v = v_smem.index(stage).reshape([HEAD, BLOCK_N]).permute((1, 0))
            else:
                b_v = v_smem.index(stage).reshape([BLOCK_N, HEAD])
            later = warpgroup_mma(b_p, b_v, acc, is_async=True)
            mbarrier.arrive(go.index(1 - WHICH), count=1)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(q_free.index(WHICH), count=1, pred=i + 1 == count)
            last_top, last_total = top, total
            top = gl.where(border, -float("inf"), top)
            total = gl.where(border, 0.0, total)
            if SCALED:
                factor = rows_factor * key_factor
            scores = _read_scores(scores, BLOCK_N, INTEGERS, FP8_VALUES)
            weights, top, total, fade = _soften(
                scores, top, total, length, factor, BLOCK_N, C_LAYOUT, SCALED, INTEGERS, FP8_VALUES
            )
            total = pin(total)
            if (
                FP8_VALUES
            ):  # the wait takes no 8-bit operands; the assembler itself keeps registers that are read
                acc, total = warpgroup_mma_wait(0, deps=[later, total])
            else:
                acc, b_p, total = warpgroup_mma_wait(0, deps=[later, b_p, total])
            mbarrier.arrive(free.index(stage), count=1)
            b_p = gl.convert_layout(weights.to(weight_type), P_LAYOUT)
            if border:
                turn += 1
                _end_tile(
                    acc, last_top, last_total, last, heads, n_q, result, scales,
                    WHICH, HEAD, O_LAYOUT, SCALED, FP8_VALUES,
                )  # fmt: skip
                acc = gl.zeros([ROWS, HEAD], gl.float32, O_LAYOUT)
            else:
                acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
            step += 1
            if i + 1 == count:  # looked up a tile ago, so nothing waits here unless it is empty
                while (next_count == 0) & (next_tile < tiles):
                    next_tile += gl.num_programs(0)
                    next_b, next_h, next_block, next_first, next_end, next_row, next_count = find_tile(
                        gl.minimum(next_tile, tiles - 1),
                        counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh,
                    )  # fmt: skip
        stage = step % STAGES
        mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        if FP8_VALUES:
            b_v = v_smem.index(stage).reshape([HEAD, BLOCK_N]).permute((1, 0))
        else:
            b_v = v_smem.index(stage).reshape([BLOCK_N, HEAD])
        later = warpgroup_mma(b_p, b_v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[later])
        _end_tile(
            acc, top, total, (i_b, i_h, i_block, first, end), heads, n_q, result, scales,
            WHICH, HEAD, O_LAYOUT, SCALED, FP8_VALUES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def block_sparse_kernel(
    q_desc, k_desc, v_desc,
    out, lse, counts, indices, q_starts, k_starts, q_scale, k_scale, v_scale, shift,
    tiles, n_q, n_k, parts, heads, n_tokens, scale_log2,
    stride_cb, stride_ch, width,
    stride_qsb, stride_qsh, stride_ksb, stride_ksh,
    stride_ob, stride_oh, stride_os,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SCALED: gl.constexpr,
    INTEGERS: gl.constexpr,
    FP8_VALUES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory and its barriers, and the three roles."""
    V_ROWS: gl.constexpr = HEAD if FP8_VALUES else BLOCK_N
    V_COLUMNS: gl.constexpr = BLOCK_N if FP8_VALUES else HEAD
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, HEAD], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
        mbarrier.init(go.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)  # both groups read keys and values
    fence_async_shared()
    memory = (q_smem, k_smem, v_smem, q_full, q_free, k_full, v_full, free)
    strides = (stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh)
    plan = (counts, indices, q_starts, k_starts, tiles, n_q, n_k, parts, heads)
    result = (out, lse, n_tokens, scale_log2, stride_ob, stride_oh, stride_os)
    scales = (q_scale, k_scale, v_scale, shift)
    gl.warp_specialize(
        [
            (
                _attend_tiles,
                (
                    memory,
                    go,
                    plan,
                    strides,
                    result,
                    scales,
                    0,
                    HEAD,
                    BLOCK_N,
                    STAGES,
                    SCALED,
                    INTEGERS,
                    FP8_VALUES,
                ),
            ),
            (
                _attend_tiles,
                (
                    memory,
                    go,
                    plan,
                    strides,
                    result,
                    scales,
                    1,
                    HEAD,
                    BLOCK_N,
                    STAGES,
                    SCALED,
                    INTEGERS,
                    FP8_VALUES,
                ),
            ),
            (
                _load_tiles,
                (
                    q_desc,
                    k_desc,
                    v_desc,
                    memory,
                    plan,
                    strides,
                    result,
                    HEAD,
                    BLOCK_N,
                    STAGES,
                    SCALED,
                    FP8_VALUES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
