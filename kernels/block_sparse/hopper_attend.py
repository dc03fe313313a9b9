"""A computing group of the Hopper kernel. See `hopper.py`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_barriers import (
    ALL,
    FREE,
    GO,
    LONE,
    LONE_FREE,
    LONE_Q_FREE,
    LONE_STAGES,
    PAIR,
    Q_FREE,
    named_arrive,
    named_wait,
)
from .hopper_softmax import (
    WEIGHT_BITS,
    code_scores,
    find_peak,
    halves,
    hold_queries,
    pack_codes,
    pack_weights,
    pin,
    shift_scores,
    sum_parts,
    unpack_weights,
    whole,
)
from .hopper_tiles import LN_2, ROWS, copy_out_wait, finish, read_note, values_from

ONES = gl.constexpr(8)  # columns of ones that weights are multiplied with to be summed


@gluon.jit
def _length(p_key, entry, n_tokens, BLOCK_N: gl.constexpr, EVEN: gl.constexpr):
    """Tokens of a key block."""
    if EVEN:
        length = gl.minimum(n_tokens - entry * BLOCK_N, BLOCK_N)
    else:
        length = gl.load(p_key + entry + 1) - gl.load(p_key + entry)
    return length


@gluon.jit
def _row_factors(
    scales, i_b, i_h, i_block, heads, n_q, scale_log2, WHICH: gl.constexpr, LAYOUT: gl.constexpr
):
    """What each row's scores are multiplied by, beside the key block's scale."""
    q_scale, _k_scale, _v_scale, _shift = scales
    place = ((i_b * heads + i_h) * n_q + i_block) * (2 * ROWS) + WHICH * ROWS
    return gl.load(q_scale + place + gl.arange(0, ROWS, layout=LAYOUT)) * scale_log2


@gluon.jit
def _ask(
    verdict, i_b, i_h, i_block, heads, n_q, first, end, count, width,
    SHIFT: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Of a tile: where the verdict on its first visited entry goes, and how far a row must rise above its maximum for
    an entry to matter. Marks the entry visited first, which always does; rows behind the end have no vote."""
    needed, threshold = verdict
    p_needed = needed + ((i_b.to(gl.int64) * heads + i_h) * n_q + i_block) * width + count - 1
    gl.store(p_needed, 1)
    rows = first + SHIFT + gl.arange(0, ROWS, layout=LAYOUT)
    return p_needed, gl.where(rows < end, threshold, float("inf"))


@gluon.jit
def _vote(p_needed, risen, bar, LAYOUT: gl.constexpr):
    """Every row in which an entry mattered marks it: no row need know of another."""
    places = p_needed + gl.zeros([ROWS], gl.int32, LAYOUT)
    gl.store(places, gl.full([ROWS], 1, gl.int8, LAYOUT), mask=risen > bar)


@gluon.jit
def _end_tile(
    acc, top, parts, tile, o_smem, heads, n_q, result, scales,
    WHICH: gl.constexpr,
    HEAD: gl.constexpr,
    LAYOUT: gl.constexpr,
    SCALED: gl.constexpr,
    FP8_VALUES: gl.constexpr,
    ALONE: gl.constexpr,
):  # fmt: skip
    """Undo what quantisation did to total and lse, and write the rows."""
    i_b, i_h, i_block, first, end = tile
    _o_desc, _out, _lse, _n_tokens, scale_log2, _stride_ob, _stride_oh, _stride_os = result
    _q_scale, _k_scale, v_scale, shift = scales
    ROW: gl.constexpr = top.type.layout
    missing = gl.zeros([ROWS], gl.float32, ROW)
    if SCALED:
        place = ((i_b * heads + i_h) * n_q + i_block) * (2 * ROWS) + WHICH * ROWS
        missing = gl.load(shift + place + gl.arange(0, ROWS, layout=ROW)) * (scale_log2 * LN_2)
    if FP8_VALUES:
        missing = missing - WEIGHT_BITS * LN_2
        total = gl.convert_layout(gl.max(parts, 1), ROW)
    else:
        total = gl.convert_layout(gl.sum(parts, 1), ROW)
    finish(
        acc, top, total, missing, first if ALONE else first + WHICH * ROWS, end, i_b, i_h,
        o_smem, heads, result, v_scale,
        WHICH, HEAD, LAYOUT, SCALED, not ALONE,
    )  # fmt: skip


@gluon.jit
def attend_tiles(
    group,
    WHICH: gl.constexpr,
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
):  # fmt: skip
    """A computing group: 64 rows of every tile that reads anything; with ALONE tiles of 64 rows, a ring and a loading
    warp of its own.

    `step` counts key blocks over all tiles, `turn` tiles; `last_*` is the tile whose rows are not written yet.
    The loop over a tile's blocks holds no branch that is seldom taken: the processor would have to fetch around it.
    """
    memory, plan, strides, result, scales, verdict = group
    q_smem, k_smem, v_smem, o_smem, ones, notes, q_full, k_full, v_full = memory
    _counts, indices, _q_starts, k_starts, _drawn, _tiles, n_q, n_k, heads, n_k_tokens, _ahead = plan
    stride_cb, stride_ch, width, _stride_qsb, _stride_qsh, stride_ksb, stride_ksh = strides
    _o_desc, out, _lse, _n_tokens, scale_log2, _stride_ob, _stride_oh, _stride_os = result
    _q_scale, k_scale, _v_scale, _shift = scales
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32 if SCALED else 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 32 if FP8_VALUES else 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 4 if FP8_VALUES else 2)
    SUM_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ONES, 32])
    SUM_P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, SUM_LAYOUT, 4)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    # Blocks of 64 keys leave room for the queries in registers: from memory they would be read for every block, as many
    # bytes as the keys, and the two together are all that memory gives.
    HELD: gl.constexpr = BLOCK_N == 64
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    SHIFT: gl.constexpr = 0 if ALONE else WHICH * ROWS  # of the group's rows in the tile
    COPIES: gl.constexpr = 1 if ALONE else 2
    FIRST_COPY: gl.constexpr = WHICH if ALONE else 0
    THREADS: gl.constexpr = LONE if ALONE else ALL
    Q_BARRIER: gl.constexpr = LONE_Q_FREE + WHICH if ALONE else Q_FREE
    FREE_BARRIER: gl.constexpr = LONE_FREE + WHICH * LONE_STAGES if ALONE else FREE
    RING: gl.constexpr = WHICH * STAGES if ALONE else 0
    query_type: gl.constexpr = q_smem.dtype
    weight_type: gl.constexpr = gl.float8e4nv if FP8_VALUES else out.dtype.element_ty
    blank = gl.zeros([ROWS, BLOCK_N], gl.int32 if INTEGERS else gl.float32, S_LAYOUT)
    blank_out = gl.zeros([ROWS, HEAD], gl.float32, O_LAYOUT)
    blank_sums = gl.zeros([ROWS, ONES], gl.float32, SUM_LAYOUT)
    mbarrier.wait(q_full.index(FIRST_COPY), 0)
    i_b, i_h, place, first, end, count = read_note(notes, FIRST_COPY)
    if count > 0:
        if WHICH == 1 and not ALONE:
            named_arrive(GO, PAIR)  # the first group goes first
        row = i_b.to(gl.int64) * stride_cb + i_h.to(gl.int64) * stride_ch + place // PIECES
        p_list = indices + row * width + count - 1
        p_key = k_starts + i_b.to(gl.int64) * stride_ksb + i_h.to(gl.int64) * stride_ksh
        entry = gl.load(p_list)
        length = _length(p_key, entry, n_k_tokens, BLOCK_N, EVEN)
        if FEEDBACK:
            p_needed, bar = _ask(
                verdict, i_b, i_h, place // PIECES, heads, n_q, first, end, count, width, SHIFT, ROW
            )
        factor = scale_log2
        rows_factor = scale_log2
        if SCALED:
            rows_factor = _row_factors(scales, i_b, i_h, place, heads, n_q, scale_log2, WHICH, ROW)
            factor = rows_factor * gl.load(k_scale + (i_b * heads + i_h) * n_k + entry)
        first_q = q_smem.index(WHICH).reshape([ROWS, HEAD])
        if HELD:
            held = hold_queries(first_q.load(Q_LAYOUT), HEAD)
            named_arrive(Q_BARRIER, THREADS)
            first_q = unpack_weights(held, query_type, HEAD, Q_LAYOUT)
        mbarrier.wait(k_full.index(RING), 0)
        b_kt = k_smem.index(RING).reshape([BLOCK_N, HEAD]).permute((1, 0))
        scores = warpgroup_mma(first_q, b_kt, blank, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        if not HELD:
            if count == 1:
                named_arrive(Q_BARRIER, THREADS)
        top = gl.full([ROWS], -float("inf"), gl.float32, ROW)
        scores, peak = find_peak(scores, length, ROW, BLOCK_N, True, INTEGERS, FP8_VALUES)
        if FP8_VALUES:
            codes, top, anchor, fade = code_scores(scores, peak, top, top, factor, INTEGERS)
            parts = gl.zeros([ROWS, ONES], gl.float32, SUM_LAYOUT)
            packed = pack_codes(codes, BLOCK_N)
        else:
            powers, top, _fade = shift_scores(scores, peak, top, factor, SCALED, INTEGERS)
            early, late = halves(gl.exp2(powers), BLOCK_N)
            parts = sum_parts(early, BLOCK_N // 2) + sum_parts(late, BLOCK_N // 2)
            PARTS: gl.constexpr = parts.type.layout
            packed = pack_weights(whole(early, late, BLOCK_N, S_LAYOUT), weight_type, BLOCK_N)
        acc = gl.zeros([ROWS, HEAD], gl.float32, O_LAYOUT)
        # New values, if equal ones: Triton carries no name through a loop that enters it with the value another has.
        last_b, last_h, last_place, last_first, last_end = i_b + 0, i_h + 0, place + 0, first + 0, end + 0
        turn = 0
        step = 0
        going = True
        while going:
            copy = turn % COPIES
            if not HELD:
                b_q = q_smem.index(2 * copy + WHICH).reshape([ROWS, HEAD])
            entry = gl.load(p_list - gl.minimum(1, count - 1))
            for i in range(1, count):
                stage = step % STAGES
                now = (step + 1) % STAGES
                if not ALONE:
                    named_wait(GO + WHICH, PAIR)
                mbarrier.wait(k_full.index(RING + now), ((step + 1) // STAGES) & 1)
                b_kt = k_smem.index(RING + now).reshape([BLOCK_N, HEAD]).permute((1, 0))
                if HELD:
                    b_q = unpack_weights(held, query_type, HEAD, Q_LAYOUT)
                scores = warpgroup_mma(b_q, b_kt, blank, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(RING + stage), (step // STAGES) & 1)
                b_p = unpack_weights(packed, weight_type, BLOCK_N, P_LAYOUT)
                b_v = values_from(v_smem.index(RING + stage), HEAD, BLOCK_N, FP8_VALUES)
                if FP8_VALUES:
                    later = warpgroup_mma(b_p, b_v, blank_out, use_acc=False, is_async=True)
                    b_p = gl.convert_layout(b_p, SUM_P_LAYOUT, assert_trivial=True)
                    sums = warpgroup_mma(b_p, ones.permute((1, 0)), blank_sums, use_acc=False, is_async=True)
                else:
                    later = warpgroup_mma(b_p, b_v, acc, is_async=True)
                if not ALONE:
                    named_arrive(GO + 1 - WHICH, PAIR)
                if not EVEN:  # else only the last block may be shorter, and lists begin with it
                    length = _length(p_key, entry, n_k_tokens, BLOCK_N, EVEN)
                if SCALED:
                    factor = rows_factor * gl.load(k_scale + (i_b * heads + i_h) * n_k + entry)
                if SCALED or not EVEN:  # looked up a step ahead
                    entry = gl.load(p_list - gl.minimum(i + 1, count - 1))
                if HELD:
                    scores, b_q = warpgroup_mma_wait(1, deps=[scores, b_q])
                else:
                    scores = warpgroup_mma_wait(2 if FP8_VALUES else 1, deps=[scores])
                    if i + 1 == count:
                        named_arrive(Q_BARRIER + copy, THREADS)
                scores, peak = find_peak(scores, length, ROW, BLOCK_N, not EVEN, INTEGERS, FP8_VALUES)
                if FEEDBACK:
                    _vote(p_needed - i, peak * factor - top, bar, ROW)
                if FP8_VALUES:
                    later, sums = warpgroup_mma_wait(0, deps=[later, sums])
                    named_arrive(FREE_BARRIER + stage, THREADS)
                    acc = gl.fma(acc, gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None], later)
                    parts = gl.fma(
                        parts, gl.convert_layout(fade, gl.SliceLayout(1, SUM_LAYOUT))[:, None], sums
                    )
                    codes, top, anchor, fade = code_scores(scores, peak, top, anchor, factor, INTEGERS)
                    packed = pack_codes(codes, BLOCK_N)
                else:
                    powers, top, fade = shift_scores(scores, peak, top, factor, SCALED, INTEGERS)
                    # Half of the weights before the wait, where `p v` runs beneath them; half beside scaling.
                    early, late = halves(powers, BLOCK_N)
                    early = gl.exp2(early)
                    sums = sum_parts(early, BLOCK_N // 2)
                    if (FEEDBACK or not EVEN) and not HELD:
                        sums = pin(sums)
                    acc, b_p, sums, late = warpgroup_mma_wait(0, deps=[later, b_p, sums, late])
                    named_arrive(FREE_BARRIER + stage, THREADS)
                    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
                    late = gl.exp2(late)
                    sums += sum_parts(late, BLOCK_N // 2)
                    parts = gl.fma(parts, gl.convert_layout(fade, gl.SliceLayout(1, PARTS))[:, None], sums)
                    packed = pack_weights(whole(early, late, BLOCK_N, S_LAYOUT), weight_type, BLOCK_N)
                step += 1
            turn += 1
            copy = turn % COPIES
            mbarrier.wait(q_full.index(FIRST_COPY + copy), (turn // COPIES) & 1)
            last_b, last_h, last_place, last_first, last_end = i_b, i_h, place, first, end
            i_b, i_h, place, first, end, count = read_note(notes, FIRST_COPY + copy)
            going = count > 0
            if going:  # the same once more, but the scores are those of the next tile's first block
                row = i_b.to(gl.int64) * stride_cb + i_h.to(gl.int64) * stride_ch + place // PIECES
                p_list = indices + row * width + count - 1
                p_key = k_starts + i_b.to(gl.int64) * stride_ksb + i_h.to(gl.int64) * stride_ksh
                entry = gl.load(p_list)
                stage = step % STAGES
                now = (step + 1) % STAGES
                next_q = q_smem.index(WHICH if ALONE else 2 * copy + WHICH).reshape([ROWS, HEAD])
                if HELD:
                    held = hold_queries(next_q.load(Q_LAYOUT), HEAD)
                    named_arrive(Q_BARRIER + copy, THREADS)
                    next_q = unpack_weights(held, query_type, HEAD, Q_LAYOUT)
                if not ALONE:
                    named_wait(GO + WHICH, PAIR)
                mbarrier.wait(k_full.index(RING + now), ((step + 1) // STAGES) & 1)
                b_kt = k_smem.index(RING + now).reshape([BLOCK_N, HEAD]).permute((1, 0))
                scores = warpgroup_mma(next_q, b_kt, blank, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(RING + stage), (step // STAGES) & 1)
                b_p = unpack_weights(packed, weight_type, BLOCK_N, P_LAYOUT)
                b_v = values_from(v_smem.index(RING + stage), HEAD, BLOCK_N, FP8_VALUES)
                if FP8_VALUES:
                    later = warpgroup_mma(b_p, b_v, blank_out, use_acc=False, is_async=True)
                    b_p = gl.convert_layout(b_p, SUM_P_LAYOUT, assert_trivial=True)
                    sums = warpgroup_mma(b_p, ones.permute((1, 0)), blank_sums, use_acc=False, is_async=True)
                else:
                    later = warpgroup_mma(b_p, b_v, acc, is_async=True)
                if not ALONE:
                    named_arrive(GO + 1 - WHICH, PAIR)
                length = _length(p_key, entry, n_k_tokens, BLOCK_N, EVEN)
                if FEEDBACK:
                    p_needed, bar = _ask(
                        verdict, i_b, i_h, place // PIECES, heads, n_q, first, end, count, width, SHIFT, ROW
                    )
                if SCALED:
                    rows_factor = _row_factors(scales, i_b, i_h, place, heads, n_q, scale_log2, WHICH, ROW)
                    factor = rows_factor * gl.load(k_scale + (i_b * heads + i_h) * n_k + entry)
                if HELD:
                    scores, next_q = warpgroup_mma_wait(1, deps=[scores, next_q])
                else:
                    scores = warpgroup_mma_wait(2 if FP8_VALUES else 1, deps=[scores])
                    if count == 1:
                        named_arrive(Q_BARRIER + copy, THREADS)
                last_parts = parts
                last_top = top
                top = gl.full([ROWS], -float("inf"), gl.float32, ROW)
                scores, peak = find_peak(scores, length, ROW, BLOCK_N, True, INTEGERS, FP8_VALUES)
                if FP8_VALUES:
                    last_top = anchor
                    later, sums = warpgroup_mma_wait(0, deps=[later, sums])
                    named_arrive(FREE_BARRIER + stage, THREADS)
                    acc = gl.fma(acc, gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None], later)
                    last_parts = gl.fma(
                        parts, gl.convert_layout(fade, gl.SliceLayout(1, SUM_LAYOUT))[:, None], sums
                    )
                    codes, top, anchor, fade = code_scores(scores, peak, top, top, factor, INTEGERS)
                    parts = gl.zeros([ROWS, ONES], gl.float32, SUM_LAYOUT)
                    packed = pack_codes(codes, BLOCK_N)
                else:
                    powers, top, _fade = shift_scores(scores, peak, top, factor, SCALED, INTEGERS)
                    early, late = halves(powers, BLOCK_N)
                    early = gl.exp2(early)
                    sums = sum_parts(early, BLOCK_N // 2)
                    acc, b_p, sums, late = warpgroup_mma_wait(0, deps=[later, b_p, sums, late])
                    named_arrive(FREE_BARRIER + stage, THREADS)
                    late = gl.exp2(late)
                    parts = sums + sum_parts(late, BLOCK_N // 2)
                    packed = pack_weights(whole(early, late, BLOCK_N, S_LAYOUT), weight_type, BLOCK_N)
                step += 1
                _end_tile(
                    acc, last_top, last_parts, (last_b, last_h, last_place, last_first, last_end),
                    o_smem, heads, n_q, result, scales,
                    WHICH, HEAD, O_LAYOUT, SCALED, FP8_VALUES, ALONE,
                )  # fmt: skip
                acc = gl.zeros([ROWS, HEAD], gl.float32, O_LAYOUT)
        stage = step % STAGES
        mbarrier.wait(v_full.index(RING + stage), (step // STAGES) & 1)
        b_p = unpack_weights(packed, weight_type, BLOCK_N, P_LAYOUT)
        b_v = values_from(v_smem.index(RING + stage), HEAD, BLOCK_N, FP8_VALUES)
        if FP8_VALUES:
            later = warpgroup_mma(b_p, b_v, blank_out, use_acc=False, is_async=True)
            b_p = gl.convert_layout(b_p, SUM_P_LAYOUT, assert_trivial=True)
            sums = warpgroup_mma(b_p, ones.permute((1, 0)), blank_sums, use_acc=False, is_async=True)
            later, sums = warpgroup_mma_wait(0, deps=[later, sums])
            acc = gl.fma(acc, gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None], later)
            parts = gl.fma(parts, gl.convert_layout(fade, gl.SliceLayout(1, SUM_LAYOUT))[:, None], sums)
            top = anchor
        else:
            later = warpgroup_mma(b_p, b_v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[later])
        _end_tile(
            acc, top, parts, (last_b, last_h, last_place, last_first, last_end),
            o_smem, heads, n_q, result, scales,
            WHICH, HEAD, O_LAYOUT, SCALED, FP8_VALUES, ALONE,
        )  # fmt: skip
        if not ALONE:
            copy_out_wait(0)
