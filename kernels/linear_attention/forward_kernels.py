"""The kernels of the forward: a state for each key block, and what a query block reads of a sum of states."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import cast, operand, phi

# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
# Strides of rows of D numbers are not among them: that all of them are multiples of 16 lets a thread move 16 bytes.
STATES_UNSPECIALIZED = ("stride_sb", "stride_sh", "heads", "blocks")


@triton.jit(do_not_specialize=STATES_UNSPECIALIZED)
def states_kernel(
    k, v, starts, states, sums,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_sb, stride_sh,
    heads, blocks,
    STEPS: tl.constexpr,
    FEATURE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    OPERANDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: the state of one key block of one head. Offsets are int64: tensors may pass 2^31 elements."""
    i_block = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    p_start = starts + i_b * stride_sb + i_h * stride_sh + i_block
    low = tl.load(p_start)
    high = tl.load(p_start + 1)
    lanes = tl.arange(0, DIM)
    k_head = k + i_b * stride_kb + i_h * stride_kh
    v_head = v + i_b * stride_vb + i_h * stride_vh
    acc = tl.zeros([DIM, DIM], dtype=tl.float32)
    total = tl.zeros([DIM], dtype=tl.float32)
    for step in range(STEPS):
        rows = low + step * ROWS + tl.arange(0, ROWS)
        inside = (rows < high)[:, None]
        rows = rows.to(tl.int64)
        p_k = k_head + rows[:, None] * stride_ks + lanes[None, :] * stride_kd
        p_v = v_head + rows[:, None] * stride_vs + lanes[None, :] * stride_vd
        b_k = phi(tl.load(p_k, mask=inside, other=0.0).to(tl.float32), FEATURE)
        b_k = tl.where(inside, b_k, 0.0)  # phi of nothing is not nothing
        b_v = operand(tl.load(p_v, mask=inside, other=0.0), OPERANDS, INTERPRETED)
        total += tl.sum(b_k, 0)
        acc = tl.dot(tl.trans(operand(b_k, OPERANDS, INTERPRETED)), b_v, acc, input_precision="ieee")
    place = (i_b * heads + i_h) * blocks + i_block
    p_state = states + place * DIM * DIM + lanes[:, None] * DIM + lanes[None, :]
    tl.store(p_state, cast(acc, states.dtype.element_ty, INTERPRETED))
    tl.store(sums + place * DIM + lanes, total)


READ_UNSPECIALIZED = ("stride_sb", "stride_sh", "parts", "eps")


@triton.jit(do_not_specialize=READ_UNSPECIALIZED)
def read_kernel(
    q, states, sums, starts, weight, bias, out,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_ob, stride_oh, stride_os, stride_od,
    stride_hb, stride_hh, stride_hn,
    stride_zb, stride_zh, stride_zn,
    stride_sb, stride_sh,
    stride_wh, stride_ch,
    parts, eps,
    STEPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    FEATURE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    OPERANDS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one query block of one head, a tile after the other. Offsets are int64: tensors may
    pass 2^31 elements."""
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
    square = lanes[:, None] * DIM + lanes[None, :]
    block = i_block.to(tl.int64)
    b_h = tl.load(states + i_b * stride_hb + i_h * stride_hh + block * stride_hn + square)
    b_h = operand(b_h, OPERANDS, INTERPRETED)
    b_z = tl.load(sums + i_b * stride_zb + i_h * stride_zh + block * stride_zn + lanes)
    if WEIGHT:
        turned = lanes[None, :] * DIM + lanes[:, None]
        b_w = operand(tl.load(weight + i_h * stride_wh + turned), OPERANDS, INTERPRETED)
    if BIAS:
        b_c = tl.load(bias + i_h * stride_ch + lanes)
    for step in range(STEPS):
        rows = first + step * ROWS + tl.arange(0, ROWS)
        inside = (rows < end)[:, None]
        rows = rows.to(tl.int64)
        p_q = q + i_b * stride_qb + i_h * stride_qh + rows[:, None] * stride_qs + lanes[None, :] * stride_qd
        p_out = (
            out + i_b * stride_ob + i_h * stride_oh + rows[:, None] * stride_os + lanes[None, :] * stride_od
        )
        b_q = phi(tl.load(p_q, mask=inside, other=0.0).to(tl.float32), FEATURE)
        if ADD:
            before = tl.load(p_out, mask=inside, other=0.0)
        acc = tl.dot(operand(b_q, OPERANDS, INTERPRETED), b_h, input_precision="ieee")
        total = tl.sum(b_q * b_z[None, :], 1) + eps
        acc = acc * tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        if WEIGHT:
            acc = tl.dot(operand(acc, OPERANDS, INTERPRETED), b_w, input_precision="ieee")
        if BIAS:
            acc += b_c[None, :]
        if ADD:
            acc += before.to(tl.float32)
        tl.store(p_out, cast(acc, out.dtype.element_ty, INTERPRETED), mask=inside)
