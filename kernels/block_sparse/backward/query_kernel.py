"""dq in Triton: one program per query block and head, pointers only (sm_80 and newer).

    p = 2^(q k^T * scale * log2(e) - lse * log2(e));  ds = p * (dout v^T - delta);  dq = scale * sum ds k
    delta = rowsum(dout * out) - dlse

One program keeps `ROWS` rows of one query block, their gradient and their sum, and walks the block's list; a key block
is read in steps of `COLUMNS` rows. It also writes `delta`, which `key_kernel` reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
UNSPECIALIZED = (
    *("stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_iq"),
    *(
        "stride_qsb",
        "stride_qsh",
        "stride_ksb",
        "stride_ksh",
        "scale",
        "scale_log2",
        "pieces",
        "n_rows",
        "heads",
    ),
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_gradients_kernel(
    grad_out, grad_lse, q, k, v, out, lse, dq, delta,
    counts, indices, q_starts, k_starts,
    stride_gb, stride_gh, stride_gs, stride_gd,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_os, stride_od,
    stride_db, stride_dh, stride_ds, stride_dd,
    stride_cb, stride_ch,
    stride_ib, stride_ih, stride_iq,
    stride_qsb, stride_qsh,
    stride_ksb, stride_ksh,
    scale, scale_log2,
    pieces, n_rows, heads,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` rows of one query block of one head. Offsets are int64: tensors may pass 2^31 elements."""
    i_block = tl.program_id(0) // pieces
    i_part = tl.program_id(0) % pieces
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)

    p_start = q_starts + i_b * stride_qsb + i_h * stride_qsh + i_block
    first = tl.load(p_start) + i_part * ROWS
    end = tl.load(p_start + 1)
    if first >= end:
        return

    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    lanes = tl.arange(0, BLOCK_D)
    row_ok = rows < end
    place = (i_b * heads + i_h) * n_rows + rows
    b_lse = tl.load(lse + place, mask=row_ok, other=-float("inf"))
    # A row that reads nothing: its weights are 2^(s - inf), and what it is given (NaN, say) must not spread.
    seen = b_lse != -float("inf")
    seen_ok = seen[:, None] if HEAD == BLOCK_D else seen[:, None] & (lanes < HEAD)[None, :]
    row_lanes = row_ok[:, None] if HEAD == BLOCK_D else row_ok[:, None] & (lanes < HEAD)[None, :]
    lse_log2 = tl.where(seen, b_lse * 1.4426950408889634, float("inf"))

    p_q = q + i_b * stride_qb + i_h * stride_qh + rows[:, None] * stride_qs + lanes[None, :] * stride_qd
    p_g = (
        grad_out + i_b * stride_gb + i_h * stride_gh + rows[:, None] * stride_gs + lanes[None, :] * stride_gd
    )
    p_o = out + i_b * stride_ob + i_h * stride_oh + rows[:, None] * stride_os + lanes[None, :] * stride_od
    b_g = tl.load(p_g, mask=seen_ok, other=0.0)
    b_o = tl.load(p_o, mask=seen_ok, other=0.0)
    b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
    b_delta -= tl.load(grad_lse + place, mask=seen, other=0.0)
    tl.store(delta + place, b_delta, mask=row_ok)
    b_q = tl.load(p_q, mask=row_lanes, other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
        b_g = b_g.to(tl.float32)

    k_head = k + i_b * stride_kb + i_h * stride_kh
    v_head = v + i_b * stride_vb + i_h * stride_vh
    starts_head = k_starts + i_b * stride_ksb + i_h * stride_ksh
    p_list = indices + i_b * stride_ib + i_h * stride_ih + i_block.to(tl.int64) * stride_iq
    count = tl.load(counts + i_b * stride_cb + i_h * stride_ch + i_block)

    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    # One flat loop over (list entry, step in its block), so that loads are pipelined across blocks.
    for i in tl.range(0, count * STEPS, num_stages=STAGES):
        entry = tl.load(p_list + (count - 1 - i // STEPS))
        low = tl.load(starts_head + entry) + (i % STEPS) * COLUMNS
        high = tl.load(starts_head + entry + 1)
        key_ok = low + columns < high
        keys = (low + columns).to(tl.int64)
        kv_ok = key_ok[:, None] if HEAD == BLOCK_D else key_ok[:, None] & (lanes < HEAD)[None, :]
        b_k = tl.load(k_head + keys[:, None] * stride_ks + lanes[None, :] * stride_kd, mask=kv_ok, other=0.0)
        b_v = tl.load(v_head + keys[:, None] * stride_vs + lanes[None, :] * stride_vd, mask=kv_ok, other=0.0)
        if UPCAST:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
        # A key past its block's end is 0, its score too: where lse is very negative its weight would be infinite.
        scores = tl.where(key_ok[None, :], scores, -float("inf"))
        weights = tl.math.exp2(scores - lse_log2[:, None])
        pull = tl.dot(b_g, tl.trans(b_v), input_precision="ieee")
        moved = weights * (pull - b_delta[:, None])
        acc = tl.dot(moved.to(b_k.dtype), b_k, acc, input_precision="ieee")

    p_d = dq + i_b * stride_db + i_h * stride_dh + rows[:, None] * stride_ds + lanes[None, :] * stride_dd
    tl.store(p_d, (acc * scale).to(dq.dtype.element_ty), mask=row_lanes)
