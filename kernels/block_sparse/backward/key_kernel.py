"""dk and dv in Triton: one program per work item of the inverse and head, pointers only (sm_80 and newer).

    p^T = 2^(k q^T * scale * log2(e) - lse * log2(e));  ds^T = p^T * (v dout^T - delta)
    dv = sum p^T dout;  dk = scale * sum ds^T q

One program keeps `COLUMNS` rows of one key block, k and v and their two sums, and walks the query blocks of its item; a
query block is read in steps of `ROWS` rows. Scores are formed transposed, so that both sums take them from registers.
Items that are chunks of one column write their sums to slots of a workspace, and `sum_chunks_kernel` adds these in
their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNSPECIALIZED = (
    *("stride_lb", "stride_lh", "stride_lk", "stride_ib", "stride_ih", "stride_ii"),
    *("stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh", "scale", "scale_log2"),
    *("pieces", "n_rows", "heads", "leads", "n_items", "slots", "longest"),
)
SUM_UNSPECIALIZED = (
    *("stride_ib", "stride_ih", "stride_ii", "stride_ksb", "stride_ksh"),
    *("pieces", "heads", "slots", "longest"),
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_gradients_kernel(
    grad_out, delta, q, k, v, lse, dk, dv, chunks,
    lists, items, q_starts, k_starts,
    stride_gb, stride_gh, stride_gs, stride_gd,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_db, stride_dh, stride_ds, stride_dd,
    stride_eb, stride_eh, stride_es, stride_ed,
    stride_lb, stride_lh, stride_lk,
    stride_ib, stride_ih, stride_ii,
    stride_qsb, stride_qsh,
    stride_ksb, stride_ksh,
    scale, scale_log2,
    pieces, n_rows, heads, leads, n_items, slots, longest,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `COLUMNS` rows of one item's key block. Offsets are int64: tensors may pass 2^31 elements."""
    i_part = tl.program_id(0) % pieces
    i_work = tl.program_id(0) // pieces
    # First what may be chunks, of all heads: one of the last head would keep its program busy when all others are done.
    if i_work < slots * leads:
        i_lead = i_work // slots
        i_item = i_work % slots
    else:
        others = n_items - slots
        i_lead = (i_work - slots * leads) // others
        i_item = slots + (i_work - slots * leads) % others
    i_h = (i_lead % heads).to(tl.int64)
    i_b = (i_lead // heads).to(tl.int64)

    p_item = items + i_b * stride_ib + i_h * stride_ih + i_item.to(tl.int64) * stride_ii
    i_block = tl.load(p_item)
    if i_block < 0:
        return
    begin = tl.load(p_item + 1)
    count = tl.load(p_item + 2)
    parts = tl.load(p_item + 3)
    p_start = k_starts + i_b * stride_ksb + i_h * stride_ksh + i_block
    first = tl.load(p_start) + i_part * COLUMNS
    end = tl.load(p_start + 1)
    if first >= end:
        return

    columns = tl.arange(0, COLUMNS)
    keys = (first + columns).to(tl.int64)
    lanes = tl.arange(0, BLOCK_D)
    key_ok = first + columns < end
    kv_ok = key_ok[:, None] if HEAD == BLOCK_D else key_ok[:, None] & (lanes < HEAD)[None, :]
    p_k = k + i_b * stride_kb + i_h * stride_kh + keys[:, None] * stride_ks + lanes[None, :] * stride_kd
    p_v = v + i_b * stride_vb + i_h * stride_vh + keys[:, None] * stride_vs + lanes[None, :] * stride_vd
    b_k = tl.load(p_k, mask=kv_ok, other=0.0)
    b_v = tl.load(p_v, mask=kv_ok, other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
        b_v = b_v.to(tl.float32)

    q_head = q + i_b * stride_qb + i_h * stride_qh
    g_head = grad_out + i_b * stride_gb + i_h * stride_gh
    starts_head = q_starts + i_b * stride_qsb + i_h * stride_qsh
    p_list = lists + i_b * stride_lb + i_h * stride_lh + i_block.to(tl.int64) * stride_lk + begin
    row_head = i_lead.to(tl.int64) * n_rows

    # Keys past the block's end have sums of their own, infinite perhaps, that are never stored.
    acc_k = tl.zeros([COLUMNS, BLOCK_D], dtype=tl.float32)
    acc_v = tl.zeros([COLUMNS, BLOCK_D], dtype=tl.float32)
    for i in tl.range(0, count * STEPS, num_stages=STAGES):
        entry = tl.load(p_list + i // STEPS)
        low = tl.load(starts_head + entry) + (i % STEPS) * ROWS
        high = tl.load(starts_head + entry + 1)
        rows = (low + tl.arange(0, ROWS)).to(tl.int64)
        row_ok = low + tl.arange(0, ROWS) < high
        q_ok = row_ok[:, None] if HEAD == BLOCK_D else row_ok[:, None] & (lanes < HEAD)[None, :]
        b_q = tl.load(q_head + rows[:, None] * stride_qs + lanes[None, :] * stride_qd, mask=q_ok, other=0.0)
        # Every row of the block that reads a key of this block has a finite lse.
        b_lse = tl.load(lse + row_head + rows, mask=row_ok, other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)
        scores = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2
        # Rows past the block's end would add nothing, since their q, dout and delta are 0. With this condition the
        # compiler (Triton 3.7) takes the offsets out of its pipeline and copies two tiles ahead instead of one.
        scores = tl.where(row_ok[None, :], scores, -float("inf"))
        weights = tl.math.exp2(scores - (b_lse * 1.4426950408889634)[None, :])
        # Here, not beside q's: the compiler keeps the order, and what waits for its use takes registers.
        b_g = tl.load(g_head + rows[:, None] * stride_gs + lanes[None, :] * stride_gd, mask=q_ok, other=0.0)
        if UPCAST:
            b_g = b_g.to(tl.float32)
        acc_v = tl.dot(weights.to(b_g.dtype), b_g, acc_v, input_precision="ieee")
        pull = tl.dot(b_v, tl.trans(b_g), input_precision="ieee")
        b_delta = tl.load(delta + row_head + rows, mask=row_ok, other=0.0)
        moved = weights * (pull - b_delta[None, :])
        acc_k = tl.dot(moved.to(b_q.dtype), b_q, acc_k, input_precision="ieee")

    acc_k = acc_k * scale
    if parts == 1:
        p_d = dk + i_b * stride_db + i_h * stride_dh + keys[:, None] * stride_ds + lanes[None, :] * stride_dd
        p_e = dv + i_b * stride_eb + i_h * stride_eh + keys[:, None] * stride_es + lanes[None, :] * stride_ed
        tl.store(p_d, acc_k.to(dk.dtype.element_ty), mask=kv_ok)
        tl.store(p_e, acc_v.to(dv.dtype.element_ty), mask=kv_ok)
    else:
        slot = (i_lead.to(tl.int64) * slots + i_item) * 2 * longest + i_part * COLUMNS
        p_chunk = chunks + (slot + columns)[:, None] * HEAD + lanes[None, :]
        tl.store(p_chunk, acc_k, mask=kv_ok)
        tl.store(p_chunk + longest.to(tl.int64) * HEAD, acc_v, mask=kv_ok)


@triton.jit(do_not_specialize=SUM_UNSPECIALIZED)
def sum_chunks_kernel(
    chunks, dk, dv, items, k_starts,
    stride_db, stride_dh, stride_ds, stride_dd,
    stride_eb, stride_eh, stride_es, stride_ed,
    stride_ib, stride_ih, stride_ii,
    stride_ksb, stride_ksh,
    pieces, heads, slots, longest,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: `COLUMNS` rows of one column that was cut, the one whose first chunk is its item."""
    i_item = tl.program_id(0) // pieces
    i_part = tl.program_id(0) % pieces
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    p_item = items + i_b * stride_ib + i_h * stride_ih + i_item.to(tl.int64) * stride_ii
    i_block = tl.load(p_item)
    parts = tl.load(p_item + 3)
    if (i_block < 0) | (parts <= 1) | (tl.load(p_item + 1) > 0):
        return
    p_start = k_starts + i_b * stride_ksb + i_h * stride_ksh + i_block
    columns = i_part * COLUMNS + tl.arange(0, COLUMNS)
    keys = (tl.load(p_start) + columns).to(tl.int64)
    lanes = tl.arange(0, BLOCK_D)
    ok = (keys < tl.load(p_start + 1))[:, None] & (lanes < HEAD)[None, :]
    slot = ((i_b * heads + i_h) * slots + i_item) * 2 * longest
    p_chunk = chunks + (slot + columns)[:, None] * HEAD + lanes[None, :]
    half = longest.to(tl.int64) * HEAD
    acc_k = tl.zeros([COLUMNS, BLOCK_D], dtype=tl.float32)
    acc_v = tl.zeros([COLUMNS, BLOCK_D], dtype=tl.float32)
    for _ in range(0, parts):
        acc_k += tl.load(p_chunk, mask=ok, other=0.0)
        acc_v += tl.load(p_chunk + half, mask=ok, other=0.0)
        p_chunk += 2 * half
    p_d = dk + i_b * stride_db + i_h * stride_dh + keys[:, None] * stride_ds + lanes[None, :] * stride_dd
    p_e = dv + i_b * stride_eb + i_h * stride_eh + keys[:, None] * stride_es + lanes[None, :] * stride_ed
    tl.store(p_d, acc_k.to(dk.dtype.element_ty), mask=ok)
    tl.store(p_e, acc_v.to(dv.dtype.element_ty), mask=ok)
