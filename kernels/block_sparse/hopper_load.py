"""The loading warp of the Hopper kernel. See `hopper.py`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_barriers import (
    ALL,
    FREE,
    LONE,
    LONE_FREE,
    LONE_Q_FREE,
    LONE_STAGES,
    Q_FREE,
    named_wait,
)
from .hopper_tiles import (
    ROWS,
    copy_in,
    draw,
    empty_rows,
    find_tile,
    look_up,
    open_ticket,
    settle,
    write_note,
)

LEAD = gl.constexpr(2)  # blocks before a tile's end at which the next one is drawn


@gluon.jit
def load_tiles(
    loader,
    WHICH: gl.constexpr,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
    EVEN: gl.constexpr,
    SCALED: gl.constexpr,
    FP8_VALUES: gl.constexpr,
    ALONE: gl.constexpr,
):  # fmt: skip
    """The loading warp: draws tiles, copies what they read, and leaves the computing groups a note for each.

    `step` counts key blocks over all tiles, `turn` tiles that have any. With ALONE it works for one computing group,
    WHICH: tiles are 64 rows, the queries are copied once (the group takes them into registers), and the group has a
    ring of its own.
    """
    q_desc, k_desc, v_desc, memory, plan, strides, result = loader
    q_smem, k_smem, v_smem, _o_smem, _ones, notes, q_full, k_full, v_full = memory
    counts, indices, q_starts, k_starts, drawn, tiles, n_q, _n_k, heads, _n_k_tokens, ahead = plan
    stride_cb, stride_ch, width, stride_qsb, stride_qsh, stride_ksb, stride_ksh = strides
    _o_desc, out, lse, n_tokens, _scale, stride_ob, stride_oh, stride_os = result
    FIXED: gl.constexpr = EVEN or SCALED  # blocks begin a fixed number of rows apart
    PARTS: gl.constexpr = 1 if ALONE else 2  # of a tile, 64 rows each
    COPIES: gl.constexpr = 1 if ALONE else 2  # of the queries: this tile's and the next one's
    THREADS: gl.constexpr = LONE if ALONE else ALL
    Q_BARRIER: gl.constexpr = LONE_Q_FREE + WHICH if ALONE else Q_FREE
    FREE_BARRIER: gl.constexpr = LONE_FREE + WHICH * LONE_STAGES if ALONE else FREE
    RING: gl.constexpr = WHICH * STAGES if ALONE else 0  # the first stage
    places = n_q * PIECES
    n_heads = tiles // places  # of all batch rows
    step = 0
    turn = 0
    drawn_first = gl.num_programs(0)  # tiles that nobody draws: every program, or group, begins with one
    tile = gl.program_id(0)
    if ALONE:
        tile = tile + WHICH * drawn_first
        drawn_first = 2 * drawn_first
    place, i_h, i_b = find_tile(gl.minimum(tile, tiles - 1), places, heads, n_heads, ahead)
    low, high, count, row = look_up(
        place, i_h, i_b, counts, q_starts, PIECES, stride_cb, stride_ch, stride_qsb, stride_qsh
    )
    while tile < tiles:
        first, end, count = settle(place, low, high, count, PIECES, PARTS * ROWS)
        this_place, this_h, this_b = place, i_h, i_b
        p_list = indices + row * width
        ticket = step  # no ticket yet
        if count == 0:
            ticket = draw(drawn)
            empty_rows(
                out, lse, this_b, this_h, first, end, heads, n_tokens, stride_ob, stride_oh, stride_os,
                HEAD, PARTS * ROWS,
            )  # fmt: skip
        else:
            p_key = k_starts + this_b.to(gl.int64) * stride_ksb + this_h.to(gl.int64) * stride_ksh
            from_row = _first_row(p_key, gl.load(p_list + count - 1), BLOCK_N, FIXED)
            for i in range(count):
                stage = step % STAGES
                # As late as the answer allows: what is drawn early waits for this tile, while others have no work left.
                if i == gl.maximum(count - LEAD, 0):
                    ticket = draw(drawn)
                # The keys here before were multiplied before the values before them: known to be done, but once.
                if step == STAGES:
                    named_wait(FREE_BARRIER + stage, THREADS)
                if i == 0:
                    copy = WHICH if ALONE else turn & 1
                    if turn >= COPIES:
                        named_wait(Q_BARRIER + copy % COPIES, THREADS)
                    write_note(notes, copy, this_b, this_h, this_place, first, end, count)
                    mbarrier.expect(q_full.index(copy), PARTS * q_desc.block_type.nbytes)
                    q_row = first
                    if SCALED:
                        q_row = this_place * (2 * ROWS)
                    for which in gl.static_range(PARTS):
                        copy_in(
                            q_desc,
                            [this_b, this_h, q_row + which * ROWS, 0],
                            q_full.index(copy),
                            q_smem.index(PARTS * copy + which),
                        )
                    turn += 1
                mbarrier.expect(k_full.index(RING + stage), k_desc.block_type.nbytes)
                copy_in(
                    k_desc,
                    [this_b, this_h, from_row, 0],
                    k_full.index(RING + stage),
                    k_smem.index(RING + stage),
                )
                # Read before waiting, so that the next copy need not wait for its address.
                from_next = _first_row(p_key, gl.load(p_list + gl.maximum(count - 2 - i, 0)), BLOCK_N, FIXED)
                if step > STAGES:
                    named_wait(FREE_BARRIER + stage, THREADS)
                mbarrier.expect(v_full.index(RING + stage), v_desc.block_type.nbytes)
                if FP8_VALUES:
                    copy_in(
                        v_desc,
                        [this_b, this_h, 0, from_row],
                        v_full.index(RING + stage),
                        v_smem.index(RING + stage),
                    )
                else:
                    copy_in(
                        v_desc,
                        [this_b, this_h, from_row, 0],
                        v_full.index(RING + stage),
                        v_smem.index(RING + stage),
                    )
                from_row = from_next
                step += 1
        # Looked up only now that the ring is full: it would keep this tile's first copies waiting.
        tile = drawn_first + open_ticket(ticket)
        place, i_h, i_b = find_tile(gl.minimum(tile, tiles - 1), places, heads, n_heads, ahead)
        low, high, count, row = look_up(
            place, i_h, i_b, counts, q_starts, PIECES, stride_cb, stride_ch, stride_qsb, stride_qsh
        )
    copy = WHICH if ALONE else turn & 1
    if turn >= COPIES:
        named_wait(Q_BARRIER + copy % COPIES, THREADS)
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
