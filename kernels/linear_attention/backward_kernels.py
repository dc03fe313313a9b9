"""The kernels of the gradient, in the order they run: of what query blocks read, then of the key blocks' states."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import cast, operand, phi, phi_backward

READ_BACKWARD_UNSPECIALIZED = ("stride_sb", "stride_sh", "heads", "blocks", "eps")


@triton.jit(do_not_specialize=READ_BACKWARD_UNSPECIALIZED)
def read_backward_kernel(
    q, grad, states, sums, starts, d_q, d_states, d_sums,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_gb, stride_gh, stride_gs, stride_gd,
    stride_db, stride_dh, stride_ds, stride_dd,
    stride_hb, stride_hh, stride_hn,
    stride_zb, stride_zh, stride_zn,
    stride_sb, stride_sh,
    heads, blocks, eps,
    STEPS: tl.constexpr,
    FEATURE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    OPERANDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: one query block of one head, its rows' gradients and its state's. Offsets are int64."""
    i_block = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    p_start = starts + i_b * stride_sb + i_h * stride_sh + i_block
    low = tl.load(p_start)
    high = tl.load(p_start + 1)
    lanes = tl.arange(0, DIM)
    block = i_block.to(tl.int64)
    turned = lanes[None, :] * DIM + lanes[:, None]
    b_ht = tl.load(states + i_b * stride_hb + i_h * stride_hh + block * stride_hn + turned)
    b_ht = operand(b_ht, OPERANDS, INTERPRETED)
    b_z = tl.load(sums + i_b * stride_zb + i_h * stride_zh + block * stride_zn + lanes)
    acc = tl.zeros([DIM, DIM], dtype=tl.float32)
    total = tl.zeros([DIM], dtype=tl.float32)
    for step in range(STEPS):
        rows = low + step * ROWS + tl.arange(0, ROWS)
        inside = (rows < high)[:, None]
        rows = rows.to(tl.int64)
        p_q = q + i_b * stride_qb + i_h * stride_qh + rows[:, None] * stride_qs + lanes[None, :] * stride_qd
        p_g = (
            grad + i_b * stride_gb + i_h * stride_gh + rows[:, None] * stride_gs + lanes[None, :] * stride_gd
        )
        x = tl.load(p_q, mask=inside, other=0.0).to(tl.float32)
        b_q = tl.where(inside, phi(x, FEATURE), 0.0)
        divisor = tl.sum(b_q * b_z[None, :], 1) + eps
        inverse = tl.where(divisor == 0.0, 0.0, 1.0 / tl.where(divisor == 0.0, 1.0, divisor))
        b_n = tl.load(p_g, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
        b_n = operand(b_n, OPERANDS, INTERPRETED)
        through = tl.dot(b_n, b_ht, input_precision="ieee")
        share = -tl.sum(b_q * through, 1) * inverse
        total += tl.sum(b_q * share[:, None], 0)
        acc = tl.dot(tl.trans(operand(b_q, OPERANDS, INTERPRETED)), b_n, acc, input_precision="ieee")
        through = phi_backward(through + share[:, None] * b_z[None, :], x, b_q, FEATURE)
        p_d = d_q + i_b * stride_db + i_h * stride_dh + rows[:, None] * stride_ds + lanes[None, :] * stride_dd
        tl.store(p_d, cast(through, d_q.dtype.element_ty, INTERPRETED), mask=inside)
    place = (i_b * heads + i_h) * blocks + i_block
    p_state = d_states + place * DIM * DIM + lanes[:, None] * DIM + lanes[None, :]
    tl.store(p_state, cast(acc, d_states.dtype.element_ty, INTERPRETED))
    tl.store(d_sums + place * DIM + lanes, total)


STATES_BACKWARD_UNSPECIALIZED = ("stride_sb", "stride_sh", "parts")


@triton.jit(do_not_specialize=STATES_BACKWARD_UNSPECIALIZED)
def states_backward_kernel(
    k, v, d_states, d_sums, starts, d_k, d_v,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_dkb, stride_dkh, stride_dks, stride_dkd,
    stride_dvb, stride_dvh, stride_dvs, stride_dvd,
    stride_hb, stride_hh, stride_hn,
    stride_zb, stride_zh, stride_zn,
    stride_sb, stride_sh,
    parts,
    STEPS: tl.constexpr,
    FEATURE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    OPERANDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one key block of one head, a tile after the other. Offsets are int64: tensors may pass
    2^31 elements."""
    i_block = tl.program_id(0) // parts
    i_part = tl.program_id(0) % parts
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    p_start = starts + i_b * stride_sb + i_h * stride_sh + i_block
    first = tl.load(p_start) + i_part * STEPS * ROWS
    end = tl.load(p_start + 1)
    if first >= end:
        return
    lanes = tl.arange(0, DIM)
    block = i_block.to(tl.int64)
    p_state = d_states + i_b * stride_hb + i_h * stride_hh + block * stride_hn
    b_h = tl.load(p_state + lanes[:, None] * DIM + lanes[None, :])
    b_h = operand(b_h, OPERANDS, INTERPRETED)
    b_z = tl.load(d_sums + i_b * stride_zb + i_h * stride_zh + block * stride_zn + lanes)
    for step in range(STEPS):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        inside = (rows < end)[:, None]
        rows = rows.to(tl.int64)
        p_k = k + i_b * stride_kb + i_h * stride_kh + rows[:, None] * stride_ks + lanes[None, :] * stride_kd
        p_v = v + i_b * stride_vb + i_h * stride_vh + rows[:, None] * stride_vs + lanes[None, :] * stride_vd
        p_dk = (
            d_k
            + i_b * stride_dkb
            + i_h * stride_dkh
            + rows[:, None] * stride_dks
            + lanes[None, :] * stride_dkd
        )
        p_dv = (
            d_v
            + i_b * stride_dvb
            + i_h * stride_dvh
            + rows[:, None] * stride_dvs
            + lanes[None, :] * stride_dvd
        )
        x = tl.load(p_k, mask=inside, other=0.0).to(tl.float32)
        b_k = phi(x, FEATURE)
        b_dv = tl.dot(operand(b_k, OPERANDS, INTERPRETED), b_h, input_precision="ieee")
        tl.store(p_dv, cast(b_dv, d_v.dtype.element_ty, INTERPRETED), mask=inside)
        b_v = operand(tl.load(p_v, mask=inside, other=0.0), OPERANDS, INTERPRETED)
        b_dk = tl.dot(b_v, tl.trans(b_h), input_precision="ieee") + b_z[None, :]
        b_dk = phi_backward(b_dk, x, b_k, FEATURE)
        tl.store(p_dk, cast(b_dk, d_k.dtype.element_ty, INTERPRETED), mask=inside)
