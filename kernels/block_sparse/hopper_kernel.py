"""The Hopper kernel: shared memory, its barriers, and the roles. What it does and why: `hopper.py`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .hopper_attend import ONES, attend_tiles
from .hopper_load import load_tiles
from .hopper_tiles import NOTE, ROWS, UNSPECIALIZED

FP8_ONE = gl.constexpr(0x38)  # the bits of 1.0


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def block_sparse_kernel(
    q_desc, k_desc, v_desc, o_desc,
    out, lse, counts, indices, q_starts, k_starts, drawn, q_scale, k_scale, v_scale, shift,
    needed, threshold,
    tiles, n_q, n_k, heads, n_tokens, n_k_tokens, ahead, scale_log2,
    stride_cb, stride_ch, width,
    stride_qsb, stride_qsh, stride_ksb, stride_ksh,
    stride_ob, stride_oh, stride_os,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
    EVEN: gl.constexpr,
    SCALED: gl.constexpr,
    INTEGERS: gl.constexpr,
    FP8_VALUES: gl.constexpr,
    FEEDBACK: gl.constexpr,
    ALONE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory and its barriers, and the three roles."""
    V_ROWS: gl.constexpr = HEAD if FP8_VALUES else BLOCK_N
    V_COLUMNS: gl.constexpr = BLOCK_N if FP8_VALUES else HEAD
    # Of each tile two copies of the queries, its own and the next one's; or, of two groups that work alone, one each.
    QUERIES: gl.constexpr = 2 if ALONE else 4
    RINGS: gl.constexpr = 2 if ALONE else 1
    BLOCKS: gl.constexpr = RINGS * STAGES
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [QUERIES, 1, 1, ROWS, HEAD], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [BLOCKS, 1, 1, BLOCK_N, HEAD], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [BLOCKS, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout)
    if ALONE:
        o_smem = q_smem  # not used: rows are written from registers
    else:
        o_smem = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, ROWS, HEAD], o_desc.layout)
    if FP8_VALUES:
        ones = gl.allocate_shared_memory(v_desc.dtype, [ONES, BLOCK_N], gl.NVMMASharedLayout(128, 8, 2))
        ONE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        # By its bits: the assembler packs converted constants wrongly (two of four bytes stay 0).
        ones.store(gl.full([ONES, BLOCK_N], FP8_ONE, gl.int8, ONE).to(v_desc.dtype, bitcast=True))
    else:
        ones = q_smem  # not used: totals are added up in registers
    notes = gl.allocate_shared_memory(gl.int32, [2 * NOTE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(BLOCKS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    memory = (q_smem, k_smem, v_smem, o_smem, ones, notes, q_full, k_full, v_full)
    strides = (stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh)
    plan = (counts, indices, q_starts, k_starts, drawn, tiles, n_q, n_k, heads, n_k_tokens, ahead)
    result = (o_desc, out, lse, n_tokens, scale_log2, stride_ob, stride_oh, stride_os)
    scales = (q_scale, k_scale, v_scale, shift)
    verdict = (needed, threshold)
    loader = (q_desc, k_desc, v_desc, memory, plan, strides, result)
    group = (memory, plan, strides, result, scales, verdict)
    # fmt: off
    if ALONE:
        gl.warp_specialize(
            [
                (attend_tiles, (group, 0, HEAD, BLOCK_N, STAGES, PIECES,
                                EVEN, SCALED, INTEGERS, FP8_VALUES, FEEDBACK, ALONE)),
                (attend_tiles, (group, 1, HEAD, BLOCK_N, STAGES, PIECES,
                                EVEN, SCALED, INTEGERS, FP8_VALUES, FEEDBACK, ALONE)),
                (load_tiles, (loader, 0, HEAD, BLOCK_N, STAGES, PIECES, EVEN, SCALED, FP8_VALUES, ALONE)),
                (load_tiles, (loader, 1, HEAD, BLOCK_N, STAGES, PIECES, EVEN, SCALED, FP8_VALUES, ALONE)),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (attend_tiles, (group, 0, HEAD, BLOCK_N, STAGES, PIECES,
                                EVEN, SCALED, INTEGERS, FP8_VALUES, FEEDBACK, ALONE)),
                (attend_tiles, (group, 1, HEAD, BLOCK_N, STAGES, PIECES,
                                EVEN, SCALED, INTEGERS, FP8_VALUES, FEEDBACK, ALONE)),
                (load_tiles, (loader, 0, HEAD, BLOCK_N, STAGES, PIECES, EVEN, SCALED, FP8_VALUES, ALONE)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    # fmt: on
