"""The steps of linear attention in Triton: one program for a block of tokens of a head (sm_80 and newer).

The feature map is taken where rows are loaded, so that neither phi(q) nor phi(k) is ever written. A state, `D x D`, is
summed in registers in float32 over all rows of its block, in one program: no atomics, and always the same order.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.plan import lead_strides

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = (16, 32, 64, 128)
NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Config:
    """A compiled shape of a kernel."""

    rows: int  # tokens of a block at once
    warps: int
    stages: int
    steps: int = (
        1  # of so many tokens by one program of "read" and "states_backward", which keeps its state meanwhile
    )


# Of 16-bit types, by kernel and whether a head has 128 numbers; smaller heads are as those of 64.
FASTEST = {
    ("states", False): Config(64, 4, 3),
    ("states", True): Config(32, 4, 3),
    ("read", False): Config(64, 4, 1),
    ("read", True): Config(32, 4, 1, steps=4),
    ("read_backward", False): Config(32, 4, 2),
    ("read_backward", True): Config(32, 8, 3),
    ("states_backward", False): Config(64, 4, 2, steps=2),
    ("states_backward", True): Config(32, 4, 1, steps=4),
}


def config_for(kernel: str, head: int, operands: torch.dtype) -> Config:
    """The one configuration of a kernel ("states", "read", "read_backward", "states_backward"): of those whose
    sums stay in registers the fastest."""
    wide = head == 128
    if operands == torch.float32:  # products on the scalar units, which take one operand whole
        return Config(16, 16 if wide and kernel in ("read", "states_backward") else 8, 1)
    return FASTEST[kernel, wide]


def why_not(q: Tensor) -> str | None:
    """Why these kernels cannot run, or None. q: `[B, H, S, D]`."""
    if q.device.type != "cuda" and not interpreting():
        return f"the tensors are on {q.device}; it runs on CUDA devices."
    if q.dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, not {q.dtype}."
    if q.shape[3] not in HEADS:
        return f"head size {q.shape[3]} is none of {', '.join(map(str, HEADS))}."
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"{torch.cuda.get_device_name(q.device)} is older than sm_80."
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU (TRITON_INTERPRET=1 before this module is imported)."""
    return not isinstance(states_kernel, triton.JITFunction)


def block_states(
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    feature: str,
    operands: torch.dtype,
    stored: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream. Arguments and results as in `reference.block_states`."""
    batch, heads, _, dim = k.shape
    blocks = starts.shape[2] - 1
    states = torch.empty(batch, heads, blocks, dim, dim, dtype=stored, device=k.device)
    sums = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=k.device)
    config = config_for("states", dim, operands)
    with _on(k):
        states_kernel[(blocks, heads, batch)](
            *(k, v, starts, states, sums),
            *(*k.stride(), *v.stride(), *lead_strides(starts), heads, blocks),
            STEPS=max(1, triton.cdiv(longest, config.rows)),
            **_shared(config, dim, feature, operands),
        )
    return states, sums


def read_states(
    q: Tensor,
    states: Tensor,
    sums: Tensor,
    starts: Tensor,
    longest: int,
    feature: str,
    eps: float,
    operands: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    add: bool,
) -> None:
    """Launch on the current stream. Arguments as in `reference.read_states`."""
    batch, heads, _, dim = q.shape
    blocks = starts.shape[2] - 1
    config = config_for("read", dim, operands)
    parts, steps = _share_out(config, longest)
    bias = None if bias is None else bias.float().contiguous()
    states, sums = _dense_blocks(states), _dense_blocks(sums)
    with _on(q):
        read_kernel[(blocks * parts, heads, batch)](
            *(
                q,
                states,
                sums,
                starts,
                states if weight is None else weight,
                sums if bias is None else bias,
                out,
            ),
            *(*q.stride(), *out.stride(), *states.stride()[:3], *sums.stride()[:3], *lead_strides(starts)),
            *(0 if x is None or len(x) == 1 else x.stride(0) for x in (weight, bias)),
            *(parts, eps),
            STEPS=steps,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            ADD=add,
            **_shared(config, dim, feature, operands),
        )


def read_states_backward(
    q: Tensor,
    grad: Tensor,
    states: Tensor,
    sums: Tensor,
    starts: Tensor,
    longest: int,
    feature: str,
    eps: float,
    operands: torch.dtype,
    stored: torch.dtype,
    d_q: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launch on the current stream. Arguments and results as in `reference.read_states_backward`."""
    batch, heads, _, dim = q.shape
    blocks = starts.shape[2] - 1
    states, sums = _dense_blocks(states), _dense_blocks(sums)
    d_states = torch.empty(batch, heads, blocks, dim, dim, dtype=stored, device=q.device)
    d_sums = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=q.device)
    config = config_for("read_backward", dim, operands)
    with _on(q):
        read_backward_kernel[(blocks, heads, batch)](
            *(q, grad, states, sums, starts, d_q, d_states, d_sums),
            *(*q.stride(), *grad.stride(), *d_q.stride(), *states.stride()[:3], *sums.stride()[:3]),
            *(*lead_strides(starts), heads, blocks, eps),
            STEPS=max(1, triton.cdiv(longest, config.rows)),
            **_shared(config, dim, feature, operands),
        )
    return d_states, d_sums


def block_states_backward(
    k: Tensor,
    v: Tensor,
    d_states: Tensor,
    d_sums: Tensor,
    starts: Tensor,
    longest: int,
    feature: str,
    operands: torch.dtype,
    d_k: Tensor,
    d_v: Tensor,
) -> None:
    """Launch on the current stream. Arguments as in `reference.block_states_backward`."""
    batch, heads, _, dim = k.shape
    blocks = starts.shape[2] - 1
    d_states, d_sums = _dense_blocks(d_states), _dense_blocks(d_sums)
    config = config_for("states_backward", dim, operands)
    parts, steps = _share_out(config, longest)
    with _on(k):
        states_backward_kernel[(blocks * parts, heads, batch)](
            *(k, v, d_states, d_sums, starts, d_k, d_v),
            *(*k.stride(), *v.stride(), *d_k.stride(), *d_v.stride()),
            *(*d_states.stride()[:3], *d_sums.stride()[:3], *lead_strides(starts), parts),
            STEPS=steps,
            **_shared(config, dim, feature, operands),
        )


def _share_out(config: Config, longest: int) -> tuple[int, int]:
    """Programs for a block, and tiles of rows for each: no more than a block of `longest` tokens has."""
    tiles = max(1, triton.cdiv(longest, config.rows))
    steps = min(config.steps, tiles)
    return triton.cdiv(tiles, steps), steps


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _dense_blocks(x: Tensor) -> Tensor:
    """`[B, H, N, ...]` whose last dimensions lie in a row; blocks that are one in memory stay one."""
    inner = x[0, 0, 0]
    if inner.is_contiguous():
        return x
    return x[:, :, :1].contiguous().expand_as(x) if x.stride(2) == 0 else x.contiguous()


def _shared(config: Config, dim: int, feature: str, operands: torch.dtype) -> dict:
    return dict(
        FEATURE=feature,
        DIM=dim,
        ROWS=config.rows,
        OPERANDS=NAMES[operands],
        INTERPRETED=interpreting(),
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
    )


@triton.jit
def _phi(x, FEATURE: tl.constexpr):
    """The feature map of rows in float32."""
    if FEATURE == "softmax":
        y = tl.exp(x - tl.max(x, 1)[:, None])
        y = y / tl.sum(y, 1)[:, None]
    elif FEATURE == "elu":
        y = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def _phi_backward(grad, x, y, FEATURE: tl.constexpr):
    """The gradient of x from that of y = phi(x)."""
    if FEATURE == "softmax":
        d = y * (grad - tl.sum(y * grad, 1)[:, None])
    elif FEATURE == "elu":
        d = grad * tl.minimum(y, 1.0)
    else:
        d = tl.where(x > 0, grad, 0.0)
    return d


@triton.jit
def _cast(x, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in a type, rounded; the interpreter cuts bfloat16 off instead, so there it is rounded in float32 first."""
    if INTERPRETED and TYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def _operand(x, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """x as products take it; the interpreter multiplies the bit patterns of bfloat16 operands, silently."""
    x = _cast(x, TYPE, INTERPRETED)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


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
        b_k = _phi(tl.load(p_k, mask=inside, other=0.0).to(tl.float32), FEATURE)
        b_k = tl.where(inside, b_k, 0.0)  # phi of nothing is not nothing
        b_v = _operand(tl.load(p_v, mask=inside, other=0.0), OPERANDS, INTERPRETED)
        total += tl.sum(b_k, 0)
        acc = tl.dot(tl.trans(_operand(b_k, OPERANDS, INTERPRETED)), b_v, acc, input_precision="ieee")
    place = (i_b * heads + i_h) * blocks + i_block
    p_state = states + place * DIM * DIM + lanes[:, None] * DIM + lanes[None, :]
    tl.store(p_state, _cast(acc, states.dtype.element_ty, INTERPRETED))
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
    b_h = _operand(b_h, OPERANDS, INTERPRETED)
    b_z = tl.load(sums + i_b * stride_zb + i_h * stride_zh + block * stride_zn + lanes)
    if WEIGHT:
        turned = lanes[None, :] * DIM + lanes[:, None]
        b_w = _operand(tl.load(weight + i_h * stride_wh + turned), OPERANDS, INTERPRETED)
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
        b_q = _phi(tl.load(p_q, mask=inside, other=0.0).to(tl.float32), FEATURE)
        if ADD:
            before = tl.load(p_out, mask=inside, other=0.0)
        acc = tl.dot(_operand(b_q, OPERANDS, INTERPRETED), b_h, input_precision="ieee")
        total = tl.sum(b_q * b_z[None, :], 1) + eps
        acc = acc * tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        if WEIGHT:
            acc = tl.dot(_operand(acc, OPERANDS, INTERPRETED), b_w, input_precision="ieee")
        if BIAS:
            acc += b_c[None, :]
        if ADD:
            acc += before.to(tl.float32)
        tl.store(p_out, _cast(acc, out.dtype.element_ty, INTERPRETED), mask=inside)


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
    b_ht = _operand(b_ht, OPERANDS, INTERPRETED)
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
        b_q = tl.where(inside, _phi(x, FEATURE), 0.0)
        divisor = tl.sum(b_q * b_z[None, :], 1) + eps
        inverse = tl.where(divisor == 0.0, 0.0, 1.0 / tl.where(divisor == 0.0, 1.0, divisor))
        b_n = tl.load(p_g, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
        b_n = _operand(b_n, OPERANDS, INTERPRETED)
        through = tl.dot(b_n, b_ht, input_precision="ieee")
        share = -tl.sum(b_q * through, 1) * inverse
        total += tl.sum(b_q * share[:, None], 0)
        acc = tl.dot(tl.trans(_operand(b_q, OPERANDS, INTERPRETED)), b_n, acc, input_precision="ieee")
        through = _phi_backward(through + share[:, None] * b_z[None, :], x, b_q, FEATURE)
        p_d = d_q + i_b * stride_db + i_h * stride_dh + rows[:, None] * stride_ds + lanes[None, :] * stride_dd
        tl.store(p_d, _cast(through, d_q.dtype.element_ty, INTERPRETED), mask=inside)
    place = (i_b * heads + i_h) * blocks + i_block
    p_state = d_states + place * DIM * DIM + lanes[:, None] * DIM + lanes[None, :]
    tl.store(p_state, _cast(acc, d_states.dtype.element_ty, INTERPRETED))
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
    b_h = _operand(b_h, OPERANDS, INTERPRETED)
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
        b_k = _phi(x, FEATURE)
        b_dv = tl.dot(_operand(b_k, OPERANDS, INTERPRETED), b_h, input_precision="ieee")
        tl.store(p_dv, _cast(b_dv, d_v.dtype.element_ty, INTERPRETED), mask=inside)
        b_v = _operand(tl.load(p_v, mask=inside, other=0.0), OPERANDS, INTERPRETED)
        b_dk = tl.dot(b_v, tl.trans(b_h), input_precision="ieee") + b_z[None, :]
        b_dk = _phi_backward(b_dk, x, b_k, FEATURE)
        tl.store(p_dk, _cast(b_dk, d_k.dtype.element_ty, INTERPRETED), mask=inside)
