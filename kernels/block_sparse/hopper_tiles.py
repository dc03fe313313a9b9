"""What the Hopper kernels share: how tiles are found, masked, ended, and what a bulk copy needs. See `hopper.py`."""

from __future__ import annotations

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

ROWS = gl.constexpr(64)  # query rows of one computing group
LN_2 = gl.constexpr(math.log(2))
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.7

# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
UNSPECIALIZED = (
    *("tiles", "n_q", "n_k", "parts", "heads", "n_tokens", "stride_cb", "stride_ch", "width"),
    *("stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh"),
)


def bulk_strides(x: Tensor) -> list[int]:
    """Strides of batch, head and token; that of a dimension of one, which means nothing, as an aligned number."""
    return [
        x.shape[3] if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]


def why_no_bulk_copy(name: str, x: Tensor) -> str | None:
    """Why the copy engine cannot read `[B, H, S, D]`, or None."""
    steps = [stride * x.element_size() for stride in bulk_strides(x)]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(step % 16 or step == 0 for step in steps):
        return (
            f"{name} cannot be copied in bulk: the head must be contiguous, everything else 16-byte aligned."
        )
    return None


@gluon.jit
def find_tile(
    tile, counts, q_starts, n_q, parts, heads, stride_cb, stride_ch, stride_qsb, stride_qsh
):  # fmt: skip
    """Batch row, head, query block, first row, end of the block, row of the plan and length of its list."""
    place = tile % (n_q * parts)
    i_bh = tile // (n_q * parts)
    i_b, i_h, i_block = i_bh // heads, i_bh % heads, place // parts
    p_start = q_starts + i_b.to(gl.int64) * stride_qsb + i_h.to(gl.int64) * stride_qsh + i_block
    first = gl.load(p_start) + (place % parts) * (2 * ROWS)
    end = gl.load(p_start + 1)
    row = i_b.to(gl.int64) * stride_cb + i_h.to(gl.int64) * stride_ch + i_block
    count = gl.where(first < end, gl.load(counts + row), 0)
    return i_b, i_h, i_block, first, end, row, count


@gluon.jit
def empty_rows(
    out, lse, i_b, i_h, first, end, heads, n_tokens, stride_ob, stride_oh, stride_os, HEAD: gl.constexpr
):
    """The loading warp's business: rows that read nothing are 0, their lse is -inf."""
    LINE: gl.constexpr = gl.BlockedLayout([HEAD // 32], [32], [1], [0])
    lanes = gl.arange(0, HEAD, layout=LINE)
    p_out = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    p_lse = lse + (i_b.to(gl.int64) * heads + i_h) * n_tokens
    for row in range(first, gl.minimum(end, first + 2 * ROWS)):
        nothing = gl.zeros([HEAD], out.dtype.element_ty, LINE)
        gl.store(p_out + row.to(gl.int64) * stride_os + lanes, nothing)
        gl.store(p_lse + row, -float("inf"))


@gluon.jit
def mask_behind(scores, length, BLOCK_N: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores of columns from `length` on become -inf.

    A thread holds a few columns of every `GROUP`. Comparing those with what is left of the length in each group takes
    as many registers; comparing all its columns with the length would keep all their numbers in registers.
    """
    grouped = scores.reshape([ROWS, BLOCK_N // GROUP, GROUP])
    GROUPED: gl.constexpr = grouped.type.layout
    group = gl.arange(0, BLOCK_N // GROUP, layout=gl.SliceLayout(0, gl.SliceLayout(2, GROUPED)))
    within = gl.arange(0, GROUP, layout=gl.SliceLayout(0, gl.SliceLayout(1, GROUPED)))
    kept = within[None, None, :] < (length - GROUP * group)[None, :, None]
    grouped = gl.where(kept, grouped, -float("inf"))
    return gl.convert_layout(grouped.reshape([ROWS, BLOCK_N]), LAYOUT)


@gluon.jit
def finish(
    acc, top, total, shift, first, end, i_b, i_h, heads, result, v_scale,
    WHICH: gl.constexpr,
    HEAD: gl.constexpr,
    LAYOUT: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """Divide by the totals and write a tile's rows. Straight from registers: the queries' memory is in use again.

    shift: what is added to the lse; with SCALED every channel is multiplied by its `v_scale`.
    """
    out, lse, n_tokens, _scale, stride_ob, stride_oh, stride_os = result
    empty = total == 0.0
    share = 1.0 / gl.where(empty, 1.0, total)
    b_lse = gl.where(empty, -float("inf"), (top + gl.log2(total)) * LN_2 + shift)
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, LAYOUT))[:, None]
    low = first + WHICH * ROWS
    rows = low + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    lanes = gl.arange(0, HEAD, layout=gl.SliceLayout(0, LAYOUT))
    if SCALED:
        acc = acc * gl.load(v_scale + (i_b * heads + i_h) * HEAD + lanes)[None, :]
    p_out = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    p_out = p_out + rows.to(gl.int64)[:, None] * stride_os + lanes[None, :]
    gl.store(p_out, acc.to(out.dtype.element_ty), mask=(rows < end)[:, None])
    rows = low + gl.arange(0, ROWS, layout=top.type.layout)
    p_lse = lse + (i_b.to(gl.int64) * heads + i_h) * n_tokens
    gl.store(p_lse + rows, b_lse, mask=rows < end)


@gluon.jit
def pin(total):
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
