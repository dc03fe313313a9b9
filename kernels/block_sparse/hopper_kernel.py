"""The Hopper kernel itself: a loading warp and two computing groups. What it does and why: `hopper.py`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_softmax import (
    WEIGHT_BITS,
    code_scores,
    find_peak,
    halves,
    pack_codes,
    pack_weights,
    pin,
    shift_scores,
    sum_parts,
    unpack_weights,
    whole,
)
from .hopper_tiles import (
    LN_2,
    NOTE,
    ROWS,
    UNSPECIALIZED,
    copy_in,
    copy_out_wait,
    draw,
    empty_rows,
    find_tile,
    finish,
    look_up,
    named_arrive,
    named_wait,
    open_ticket,
    read_note,
    settle,
    values_from,
    write_note,
)

# Barriers that count threads, by number; Triton itself takes the lowest. Unlike those in memory they cost the computing
# groups one instruction: no thread need speak for its group, and nobody polls.
GO = gl.constexpr(8)  # and 9: a computing group may issue its products
Q_FREE = gl.constexpr(10)  # and 11: both groups have multiplied this copy of the queries for the last time
FREE = gl.constexpr(12)  # to 15: both groups have multiplied this stage's values
FP8_ONE = gl.constexpr(0x38)  # the bits of 1.0
ONES = gl.constexpr(8)  # columns of ones that weights are multiplied with to be summed
PAIR = gl.constexpr(256)  # threads of both computing groups
ALL = gl.constexpr(288)  # and of the loading warp


@gluon.jit
def _load_tiles(
    q_desc, k_desc, v_desc, memory, plan, strides, result,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
    EVEN: gl.constexpr,
    SCALED: gl.constexpr,
    FP8_VALUES: gl.constexpr,
):  # fmt: skip
    """The loading warp: draws tiles, copies what they read, and leaves the computing groups a note for each.

    `step` counts key blocks over all tiles, `turn` tiles that have any.
    """
    q_smem, k_smem, v_smem, _o_smem, _ones, notes, q_full, k_full, v_full = memory
    counts, indices, q_starts, k_starts, drawn, tiles, n_q, _n_k, heads, _n_k_tokens, ahead = plan
    stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh = strides
    _o_desc, out, lse, n_tokens, _scale, stride_ob, stride_oh, stride_os = result
    FIXED: gl.constexpr = EVEN or SCALED  # blocks begin a fixed number of rows apart
    places = n_q * PIECES
    n_heads = tiles // places  # of all batch rows
    step = 0
    turn = 0
    tile = gl.program_id(0)
    place, i_h, i_b = find_tile(tile, places, heads, n_heads, ahead)
    low, high, count, row = look_up(
        place, i_h, i_b, counts, q_starts, PIECES, stride_cb, stride_ch, stride_qsb, stride_qsh
    )
    while tile < tiles:
        first, end, count = settle(place, low, high, count, PIECES)
        this_place, this_h, this_b = place, i_h, i_b
        p_list = indices + row * width
        ticket = draw(drawn)
        if count == 0:
            empty_rows(
                out, lse, this_b, this_h, first, end, heads, n_tokens, stride_ob, stride_oh, stride_os, HEAD
            )
        else:
            p_key = k_starts + this_b.to(gl.int64) * stride_ksb + this_h.to(gl.int64) * stride_ksh
            from_row = _first_row(p_key, gl.load(p_list + count - 1), BLOCK_N, FIXED)
            for i in range(count):
                stage = step % STAGES
                # The keys here before were multiplied before the values before them: known to be done, but once.
                if step == STAGES:
                    named_wait(FREE + stage, ALL)
                if i == 0:
                    copy = turn & 1
                    if turn > 1:
                        named_wait(Q_FREE + copy, ALL)
                    write_note(notes, copy, this_b, this_h, this_place, first, end, count)
                    mbarrier.expect(q_full.index(copy), 2 * q_desc.block_type.nbytes)
                    q_row = first
                    if SCALED:
                        q_row = this_place * (2 * ROWS)
                    for which in gl.static_range(2):
                        copy_in(
                            q_desc,
                            [this_b, this_h, q_row + which * ROWS, 0],
                            q_full.index(copy),
                            q_smem.index(2 * copy + which),
                        )
                    turn += 1
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                copy_in(k_desc, [this_b, this_h, from_row, 0], k_full.index(stage), k_smem.index(stage))
                # Read before waiting, so that the next copy need not wait for its address.
                from_next = _first_row(p_key, gl.load(p_list + gl.maximum(count - 2 - i, 0)), BLOCK_N, FIXED)
                if step > STAGES:
                    named_wait(FREE + stage, ALL)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                if FP8_VALUES:
                    copy_in(v_desc, [this_b, this_h, 0, from_row], v_full.index(stage), v_smem.index(stage))
                else:
                    copy_in(v_desc, [this_b, this_h, from_row, 0], v_full.index(stage), v_smem.index(stage))
                from_row = from_next
                step += 1
        # Looked up only now that the ring is full: it would keep this tile's first copies waiting.
        tile = gl.num_programs(0) + open_ticket(ticket)
        place, i_h, i_b = find_tile(gl.minimum(tile, tiles - 1), places, heads, n_heads, ahead)
        low, high, count, row = look_up(
            place, i_h, i_b, counts, q_starts, PIECES, stride_cb, stride_ch, stride_qsb, stride_qsh
        )
    copy = turn & 1
    if turn > 1:
        named_wait(Q_FREE + copy, ALL)
    write_note(notes, copy, 0, 0, 0, 0, 0, 0)  # no more tiles
    mbarrier.arrive(q_full.index(copy), count=1)


@gluon.jit
def _first_row(p_key, entry, BLOCK_N: gl.constexpr, FIXED: gl.constexpr):
    """Where the copy of a key block begins."""
    if FIXED:
        row = entry * BLOCK_N
    else:
        row = gl.load(p_key + entry)
    return row


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
    WHICH: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Of a tile: where the verdict on its first visited entry goes, and how far a row must rise above its maximum for
    an entry to matter. Marks the entry visited first, which always does; rows behind the end have no vote."""
    needed, threshold = verdict
    p_needed = needed + ((i_b.to(gl.int64) * heads + i_h) * n_q + i_block) * width + count - 1
    gl.store(p_needed, 1)
    rows = first + WHICH * ROWS + gl.arange(0, ROWS, layout=LAYOUT)
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
        acc, top, total, missing, first, end, i_b, i_h, o_smem, heads, result, v_scale,
        WHICH, HEAD, LAYOUT, SCALED,
    )  # fmt: skip


@gluon.jit
def _attend_tiles(
    memory, plan, strides, result, scales, verdict,
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
):  # fmt: skip
    """A computing group: 64 rows of every tile that reads anything.

    `step` counts key blocks over all tiles, `turn` tiles; `last_*` is the tile whose rows are not written yet.
    The loop over a tile's blocks holds no branch that is seldom taken: the processor would have to fetch around it.
    """
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
    weight_type: gl.constexpr = gl.float8e4nv if FP8_VALUES else out.dtype.element_ty
    blank = gl.zeros([ROWS, BLOCK_N], gl.int32 if INTEGERS else gl.float32, S_LAYOUT)
    blank_out = gl.zeros([ROWS, HEAD], gl.float32, O_LAYOUT)
    blank_sums = gl.zeros([ROWS, ONES], gl.float32, SUM_LAYOUT)
    mbarrier.wait(q_full.index(0), 0)
    i_b, i_h, place, first, end, count = read_note(notes, 0)
    if count > 0:
        if WHICH == 1:
            named_arrive(GO, PAIR)  # the first group goes first
        row = i_b.to(gl.int64) * stride_cb + i_h.to(gl.int64) * stride_ch + place // PIECES
        p_list = indices + row * width + count - 1
        p_key = k_starts + i_b.to(gl.int64) * stride_ksb + i_h.to(gl.int64) * stride_ksh
        entry = gl.load(p_list)
        length = _length(p_key, entry, n_k_tokens, BLOCK_N, EVEN)
        if FEEDBACK:
            p_needed, bar = _ask(
                verdict, i_b, i_h, place // PIECES, heads, n_q, first, end, count, width, WHICH, ROW
            )
        factor = scale_log2
        rows_factor = scale_log2
        if SCALED:
            rows_factor = _row_factors(scales, i_b, i_h, place, heads, n_q, scale_log2, WHICH, ROW)
            factor = rows_factor * gl.load(k_scale + (i_b * heads + i_h) * n_k + entry)
        mbarrier.wait(k_full.index(0), 0)
        b_q = q_smem.index(WHICH).reshape([ROWS, HEAD])
        b_kt = k_smem.index(0).reshape([BLOCK_N, HEAD]).permute((1, 0))
        scores = warpgroup_mma(b_q, b_kt, blank, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        if count == 1:
            named_arrive(Q_FREE, ALL)
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
            copy = turn & 1
            b_q = q_smem.index(2 * copy + WHICH).reshape([ROWS, HEAD])
            entry = gl.load(p_list - gl.minimum(1, count - 1))
            for i in range(1, count):
                stage = step % STAGES
                now = (step + 1) % STAGES
                named_wait(GO + WHICH, PAIR)
                mbarrier.wait(k_full.index(now), ((step + 1) // STAGES) & 1)
                b_kt = k_smem.index(now).reshape([BLOCK_N, HEAD]).permute((1, 0))
                scores = warpgroup_mma(b_q, b_kt, blank, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
                b_p = unpack_weights(packed, weight_type, BLOCK_N, P_LAYOUT)
                b_v = values_from(v_smem.index(stage), HEAD, BLOCK_N, FP8_VALUES)
                if FP8_VALUES:
                    later = warpgroup_mma(b_p, b_v, blank_out, use_acc=False, is_async=True)
                    b_p = gl.convert_layout(b_p, SUM_P_LAYOUT, assert_trivial=True)
                    sums = warpgroup_mma(b_p, ones.permute((1, 0)), blank_sums, use_acc=False, is_async=True)
                else:
                    later = warpgroup_mma(b_p, b_v, acc, is_async=True)
                named_arrive(GO + 1 - WHICH, PAIR)
                if not EVEN:  # else only the last block may be shorter, and lists begin with it
                    length = _length(p_key, entry, n_k_tokens, BLOCK_N, EVEN)
                if SCALED:
                    factor = rows_factor * gl.load(k_scale + (i_b * heads + i_h) * n_k + entry)
                if SCALED or not EVEN:  # looked up a step ahead
                    entry = gl.load(p_list - gl.minimum(i + 1, count - 1))
                scores = warpgroup_mma_wait(2 if FP8_VALUES else 1, deps=[scores])
                if i + 1 == count:
                    named_arrive(Q_FREE + copy, ALL)
                scores, peak = find_peak(scores, length, ROW, BLOCK_N, not EVEN, INTEGERS, FP8_VALUES)
                if FEEDBACK:
                    _vote(p_needed - i, peak * factor - top, bar, ROW)
                if FP8_VALUES:
                    later, sums = warpgroup_mma_wait(0, deps=[later, sums])
                    named_arrive(FREE + stage, ALL)
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
                    if FEEDBACK or not EVEN:
                        sums = pin(sums)
                    acc, b_p, sums, late = warpgroup_mma_wait(0, deps=[later, b_p, sums, late])
                    named_arrive(FREE + stage, ALL)
                    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
                    late = gl.exp2(late)
                    sums += sum_parts(late, BLOCK_N // 2)
                    parts = gl.fma(parts, gl.convert_layout(fade, gl.SliceLayout(1, PARTS))[:, None], sums)
                    packed = pack_weights(whole(early, late, BLOCK_N, S_LAYOUT), weight_type, BLOCK_N)
                step += 1
            turn += 1
            copy = turn & 1
            mbarrier.wait(q_full.index(copy), (turn >> 1) & 1)
            last_b, last_h, last_place, last_first, last_end = i_b, i_h, place, first, end
            i_b, i_h, place, first, end, count = read_note(notes, copy)
            going = count > 0
            if going:  # the same once more, but the scores are those of the next tile's first block
                row = i_b.to(gl.int64) * stride_cb + i_h.to(gl.int64) * stride_ch + place // PIECES
                p_list = indices + row * width + count - 1
                p_key = k_starts + i_b.to(gl.int64) * stride_ksb + i_h.to(gl.int64) * stride_ksh
                entry = gl.load(p_list)
                stage = step % STAGES
                now = (step + 1) % STAGES
                named_wait(GO + WHICH, PAIR)
                mbarrier.wait(k_full.index(now), ((step + 1) // STAGES) & 1)
                b_q = q_smem.index(2 * copy + WHICH).reshape([ROWS, HEAD])
                b_kt = k_smem.index(now).reshape([BLOCK_N, HEAD]).permute((1, 0))
                scores = warpgroup_mma(b_q, b_kt, blank, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
                b_p = unpack_weights(packed, weight_type, BLOCK_N, P_LAYOUT)
                b_v = values_from(v_smem.index(stage), HEAD, BLOCK_N, FP8_VALUES)
                if FP8_VALUES:
                    later = warpgroup_mma(b_p, b_v, blank_out, use_acc=False, is_async=True)
                    b_p = gl.convert_layout(b_p, SUM_P_LAYOUT, assert_trivial=True)
                    sums = warpgroup_mma(b_p, ones.permute((1, 0)), blank_sums, use_acc=False, is_async=True)
                else:
                    later = warpgroup_mma(b_p, b_v, acc, is_async=True)
                named_arrive(GO + 1 - WHICH, PAIR)
                length = _length(p_key, entry, n_k_tokens, BLOCK_N, EVEN)
                if FEEDBACK:
                    p_needed, bar = _ask(
                        verdict, i_b, i_h, place // PIECES, heads, n_q, first, end, count, width, WHICH, ROW
                    )
                if SCALED:
                    rows_factor = _row_factors(scales, i_b, i_h, place, heads, n_q, scale_log2, WHICH, ROW)
                    factor = rows_factor * gl.load(k_scale + (i_b * heads + i_h) * n_k + entry)
                scores = warpgroup_mma_wait(2 if FP8_VALUES else 1, deps=[scores])
                if count == 1:
                    named_arrive(Q_FREE + copy, ALL)
                last_parts = parts
                last_top = top
                top = gl.full([ROWS], -float("inf"), gl.float32, ROW)
                scores, peak = find_peak(scores, length, ROW, BLOCK_N, True, INTEGERS, FP8_VALUES)
                if FP8_VALUES:
                    last_top = anchor
                    later, sums = warpgroup_mma_wait(0, deps=[later, sums])
                    named_arrive(FREE + stage, ALL)
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
                    named_arrive(FREE + stage, ALL)
                    late = gl.exp2(late)
                    parts = sums + sum_parts(late, BLOCK_N // 2)
                    packed = pack_weights(whole(early, late, BLOCK_N, S_LAYOUT), weight_type, BLOCK_N)
                step += 1
                _end_tile(
                    acc, last_top, last_parts, (last_b, last_h, last_place, last_first, last_end),
                    o_smem, heads, n_q, result, scales,
                    WHICH, HEAD, O_LAYOUT, SCALED, FP8_VALUES,
                )  # fmt: skip
                acc = gl.zeros([ROWS, HEAD], gl.float32, O_LAYOUT)
        stage = step % STAGES
        mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        b_p = unpack_weights(packed, weight_type, BLOCK_N, P_LAYOUT)
        b_v = values_from(v_smem.index(stage), HEAD, BLOCK_N, FP8_VALUES)
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
            WHICH, HEAD, O_LAYOUT, SCALED, FP8_VALUES,
        )  # fmt: skip
        copy_out_wait(0)


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
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory and its barriers, and the three roles."""
    V_ROWS: gl.constexpr = HEAD if FP8_VALUES else BLOCK_N
    V_COLUMNS: gl.constexpr = BLOCK_N if FP8_VALUES else HEAD
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, ROWS, HEAD], q_desc.layout)  # two copies
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, ROWS, HEAD], o_desc.layout)
    ones = gl.allocate_shared_memory(v_desc.dtype, [ONES, BLOCK_N], gl.NVMMASharedLayout(128, 8, 2))
    ONE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    if FP8_VALUES:
        # By its bits: the assembler packs converted constants wrongly (two of four bytes stay 0).
        ones.store(gl.full([ONES, BLOCK_N], FP8_ONE, gl.int8, ONE).to(v_desc.dtype, bitcast=True))
    notes = gl.allocate_shared_memory(gl.int32, [2 * NOTE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    memory = (q_smem, k_smem, v_smem, o_smem, ones, notes, q_full, k_full, v_full)
    strides = (stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh)
    plan = (counts, indices, q_starts, k_starts, drawn, tiles, n_q, n_k, heads, n_k_tokens, ahead)
    result = (o_desc, out, lse, n_tokens, scale_log2, stride_ob, stride_oh, stride_os)
    scales = (q_scale, k_scale, v_scale, shift)
    verdict = (needed, threshold)
    gl.warp_specialize(
        [
            (
                _attend_tiles,
                (
                    memory,
                    plan,
                    strides,
                    result,
                    scales,
                    verdict,
                    0,
                    HEAD,
                    BLOCK_N,
                    STAGES,
                    PIECES,
                    EVEN,
                    SCALED,
                    INTEGERS,
                    FP8_VALUES,
                    FEEDBACK,
                ),
            ),
            (
                _attend_tiles,
                (
                    memory,
                    plan,
                    strides,
                    result,
                    scales,
                    verdict,
                    1,
                    HEAD,
                    BLOCK_N,
                    STAGES,
                    PIECES,
                    EVEN,
                    SCALED,
                    INTEGERS,
                    FP8_VALUES,
                    FEEDBACK,
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
                    PIECES,
                    EVEN,
                    SCALED,
                    FP8_VALUES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
