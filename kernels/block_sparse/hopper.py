"""Block-sparse attention forward for Hopper (sm_90) in Gluon: loading and computing warps, copies by TMA.

A program of twelve warps stays on its multiprocessor and takes one tile of 128 query rows after another. One warp
loads: it walks the tile's list, fills a ring of key and value blocks, and is already at the next tile while this one
ends. Two groups of four warps compute, 64 query rows each. Two overlaps keep the tensor cores busy while exponentials
are taken, both from FlashAttention-3 (arXiv:2407.08608, sections 3.1 and 3.2):

- inside a group, `q k^T` of the next block is issued before the softmax of this one, and `p v` runs beneath it;
- between the groups, `go` lets one issue its products while the other takes its exponentials.

The arithmetic is that of `triton.py`. Rows behind a block's end are read with it, as part of a copy of fixed size, and
weighted with zero; only the end of the sequence is filled with zeros by the copy. So a NaN anywhere in the keys or
values of a head may reach any of its rows, as it does in dense attention. Heads and batch rows never mix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.plan import BlockPlan, lead_strides

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
HEADS = (64, 128)
KEY_ROWS = 128  # of one copy; no key block may be longer
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 32

ROWS = gl.constexpr(64)  # query rows of one consumer
LN_2 = gl.constexpr(math.log(2))
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.7


@dataclass(frozen=True)
class Config:
    """A compiled shape of the kernel."""

    stages: int  # key and value blocks in the ring: as many as 227 KB of shared memory hold


def config_for(head: int) -> Config:
    """The one configuration for this head size."""
    return Config(stages=3 if head == 128 else 4)


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
    for name, x in (("q", q), ("k", k), ("v", v)):
        steps = [stride * x.element_size() for stride in _strides(x)]
        if x.stride(3) != 1 or x.data_ptr() % 16 or any(step % 16 or step == 0 for step in steps):
            return f"{name} cannot be copied in bulk: the head must be contiguous, everything else 16-byte aligned."
    return None


def block_sparse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the current stream. Arguments and results as in `reference.block_sparse`."""
    batch, heads, n_q, head = q.shape
    if scale <= 0:  # the maximum is taken before scaling
        q, scale = -q, max(-scale, 1e-30)
    config = config_for(head)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, n_q, dtype=torch.float32, device=q.device)
    counts, indices = plan.counts.contiguous(), plan.indices.contiguous()
    rows, key_rows = ROWS.value, KEY_ROWS
    parts = max(1, -(-plan.max_q_block // (2 * rows)))
    tiles = batch * heads * plan.n_q * parts
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    with torch.cuda.device(q.device):
        block_sparse_kernel[(min(tiles, processors),)](
            *(_describe(q, rows), _describe(k, key_rows), _describe(v, key_rows)),
            *(out, lse, counts, indices, plan.q_starts, plan.k_starts),
            *(tiles, plan.n_q, parts, heads, n_q, scale * math.log2(math.e)),
            *(*lead_strides(counts), indices.shape[3]),
            *(*lead_strides(plan.q_starts), *lead_strides(plan.k_starts)),
            *out.stride()[:3],
            HEAD=head,
            BLOCK_N=key_rows,
            STAGES=config.stages,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS,
            PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return out, lse


def shared_layout(rows: int, head: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a copied block `[1, 1, rows, head]` lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head], DTYPES[dtype])


def _describe(x: Tensor, rows: int) -> TensorDescriptor:
    """All four dimensions: a copy that runs past the end of a head gets zeros, never the next head's tokens."""
    layout = shared_layout(rows, x.shape[3], x.dtype)
    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], [1, 1, rows, x.shape[3]], layout)


def _strides(x: Tensor) -> list[int]:
    """Strides of batch, head and token; that of a dimension of one, which means nothing, as an aligned number."""
    return [
        x.shape[3] if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]


@gluon.jit
def _find_tile(
    tile, counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh
):  # fmt: skip
    """Batch row, head, first row, end of the query block, row of the plan and length of its list."""
    place = tile % (n_q * parts)
    i_bh = tile // (n_q * parts)
    i_b, i_h, i_block = i_bh // heads, i_bh % heads, place // parts
    p_start = q_starts + i_b.to(gl.int64) * stride_qsb + i_h.to(gl.int64) * stride_qsh + i_block
    first = gl.load(p_start) + (place % parts) * (2 * ROWS)
    end = gl.load(p_start + 1)
    row = i_b.to(gl.int64) * stride_cb + i_h.to(gl.int64) * stride_ch + i_block
    count = gl.where(first < end, gl.load(counts + row), 0)
    return i_b, i_h, first, end, row, count


@gluon.jit
def _load_tiles(
    q_desc, k_desc, v_desc, memory, plan, strides,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp. `step` counts key blocks over all tiles, `turn` tiles that have any."""
    q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free = memory
    counts, indices, q_starts, k_starts, tiles, n_q, parts, heads = plan
    stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh = strides
    step = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_b, i_h, first, _end, row, count = _find_tile(
            tile, counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh
        )
        if count > 0:
            p_list = indices + row * width
            p_key = k_starts + i_b.to(gl.int64) * stride_ksb + i_h.to(gl.int64) * stride_ksh
            low = gl.load(p_key + gl.load(p_list + count - 1))
            for i in range(count):
                stage = step % STAGES
                free = ((step // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(stage), free)
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
                ahead = gl.load(p_key + gl.load(p_list + gl.maximum(count - 2 - i, 0)))
                mbarrier.wait(v_free.index(stage), free)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                copy_in(v_desc, [i_b, i_h, low, 0], v_full.index(stage), v_smem.index(stage))
                low = ahead
                step += 1


@gluon.jit
def _mask_behind(scores, length, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores of columns from `length` on become -inf.

    A thread holds two columns out of every eight. Comparing those two with what is left of the length in each group of
    eight takes two registers; comparing all its columns with the length would keep all their numbers in registers.
    """
    grouped = scores.reshape([ROWS, BLOCK_N // 8, 8])
    GROUPED: gl.constexpr = grouped.type.layout
    group = gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, GROUPED)))
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, GROUPED)))
    kept = within[None, None, :] < (length - 8 * group)[None, :, None]
    grouped = gl.where(kept, grouped, -float("inf"))
    return gl.convert_layout(grouped.reshape([ROWS, BLOCK_N]), LAYOUT)


@gluon.jit
def _soften(scores, top, total, length, scale_log2, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Weights `2^(s - m')` of one block, the new maximum and total, and the factor by which older parts fade."""
    if length < BLOCK_N:
        scores = _mask_behind(scores, length, BLOCK_N, LAYOUT)
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    # While a row has met no key its maximum is -inf, and -inf - -inf would be NaN.
    anchor = gl.where(new_top == -float("inf"), 0.0, new_top)
    weights = gl.exp2(gl.fma(scores, scale_log2, -anchor[:, None]))
    fade = gl.exp2(top - anchor)
    return weights, new_top, gl.fma(total, fade, gl.sum(weights, 1)), fade


@gluon.jit
def _attend_tiles(
    memory, go, plan, strides, result,
    WHICH: gl.constexpr,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group: 64 rows of every tile. Counts as in `_load_tiles`; `pair` counts uses of `go`."""
    q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free = memory
    counts, indices, q_starts, k_starts, tiles, n_q, parts, heads = plan
    stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh = strides
    out, lse, n_tokens, scale_log2, stride_ob, stride_oh, stride_os = result
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = out.dtype.element_ty
    b_q = q_smem.index(WHICH).reshape([ROWS, HEAD])
    step = 0
    turn = 0
    pair = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_b, i_h, first, end, row, count = _find_tile(
            tile, counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh
        )
        if first < end:
            b_out = gl.zeros([ROWS, HEAD], dtype, STORE)
            b_lse = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
            if count > 0:
                top = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
                total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
                acc = gl.zeros([ROWS, HEAD], gl.float32, O_LAYOUT)
                p_list = indices + row * width + count - 1
                p_key = k_starts + i_b.to(gl.int64) * stride_ksb + i_h.to(gl.int64) * stride_ksh
                unused = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
                entry = gl.load(p_list)
                length = gl.load(p_key + entry + 1) - gl.load(p_key + entry)
                stage = step % STAGES
                phase = (step // STAGES) & 1
                mbarrier.wait(q_full.index(WHICH), turn & 1)
                mbarrier.wait(k_full.index(stage), phase)
                b_kt = k_smem.index(stage).reshape([BLOCK_N, HEAD]).permute((1, 0))
                scores = warpgroup_mma(b_q, b_kt, unused, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                mbarrier.arrive(k_free.index(stage), count=1)
                weights, top, total, fade = _soften(scores, top, total, length, scale_log2, BLOCK_N, S_LAYOUT)
                b_p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
                for i in range(1, count):
                    entry = gl.load(p_list - i)
                    length = gl.load(p_key + entry + 1) - gl.load(p_key + entry)
                    step += 1
                    now = step % STAGES
                    now_phase = (step // STAGES) & 1
                    mbarrier.wait(go.index(WHICH), (pair & 1) ^ (1 - WHICH))  # the first group goes first
                    pair += 1
                    mbarrier.wait(k_full.index(now), now_phase)
                    b_kt = k_smem.index(now).reshape([BLOCK_N, HEAD]).permute((1, 0))
                    scores = warpgroup_mma(b_q, b_kt, unused, use_acc=False, is_async=True)
                    mbarrier.wait(v_full.index(stage), phase)
                    b_v = v_smem.index(stage).reshape([BLOCK_N, HEAD])
                    later = warpgroup_mma(b_p, b_v, acc, is_async=True)
                    mbarrier.arrive(go.index(1 - WHICH), count=1)
                    scores = warpgroup_mma_wait(1, deps=[scores])
                    mbarrier.arrive(k_free.index(now), count=1)
                    weights, top, total, fade = _soften(
                        scores, top, total, length, scale_log2, BLOCK_N, S_LAYOUT
                    )
                    total = _pin(total)
                    acc, b_p, total = warpgroup_mma_wait(0, deps=[later, b_p, total])
                    mbarrier.arrive(v_free.index(stage), count=1)
                    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
                    b_p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
                    stage = now
                    phase = now_phase
                step += 1
                turn += 1
                mbarrier.wait(v_full.index(stage), phase)
                b_v = v_smem.index(stage).reshape([BLOCK_N, HEAD])
                later = warpgroup_mma(b_p, b_v, acc, is_async=True)
                acc, b_p = warpgroup_mma_wait(0, deps=[later, b_p])
                mbarrier.arrive(v_free.index(stage), count=1)

                empty = total == 0.0
                share = 1.0 / gl.where(empty, 1.0, total)
                b_lse = gl.where(empty, -float("inf"), (top + gl.log2(total)) * LN_2)
                acc = acc * gl.convert_layout(share, gl.SliceLayout(1, O_LAYOUT))[:, None]
                b_q.store(acc.to(dtype))  # by way of the queries' memory into whole lines
                b_out = b_q.load(STORE)
                fence_async_shared()
                mbarrier.arrive(q_free.index(WHICH), count=1)
            low = first + WHICH * ROWS
            rows = low + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE))
            lanes = gl.arange(0, HEAD, layout=gl.SliceLayout(0, STORE))
            p_out = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
            p_out = p_out + rows.to(gl.int64)[:, None] * stride_os + lanes[None, :]
            gl.store(p_out, b_out, mask=(rows < end)[:, None])
            rows = low + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
            p_lse = lse + (i_b.to(gl.int64) * heads + i_h) * n_tokens
            gl.store(p_lse + rows, b_lse, mask=rows < end)


@gluon.jit
def _pin(total):
    """`total`, with a store that never happens (a sum of exponentials is not negative) but must stay where it is.

    Without it the assembler moves the exponentials behind the wait for `p v` that follows, where nothing overlaps them.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, 0f00000000; "
        "@p st.shared.f32 [a], $1; mov.b32 $0, $1; }",
        "=f,f",
        [total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
UNSPECIALIZED = (
    *("tiles", "n_q", "parts", "heads", "n_tokens", "stride_cb", "stride_ch", "width"),
    *("stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh"),
)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def block_sparse_kernel(
    q_desc, k_desc, v_desc,
    out, lse, counts, indices, q_starts, k_starts,
    tiles, n_q, parts, heads, n_tokens, scale_log2,
    stride_cb, stride_ch, width,
    stride_qsb, stride_qsh, stride_ksb, stride_ksh,
    stride_ob, stride_oh, stride_os,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory and its barriers, and the three roles."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, HEAD], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
        mbarrier.init(go.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)  # both groups read it
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    memory = (q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free)
    strides = (stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh)
    plan = (counts, indices, q_starts, k_starts, tiles, n_q, parts, heads)
    result = (out, lse, n_tokens, scale_log2, stride_ob, stride_oh, stride_os)
    gl.warp_specialize(
        [
            (_attend_tiles, (memory, go, plan, strides, result, 0, HEAD, BLOCK_N, STAGES)),
            (_attend_tiles, (memory, go, plan, strides, result, 1, HEAD, BLOCK_N, STAGES)),
            (_load_tiles, (q_desc, k_desc, v_desc, memory, plan, strides, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
