"""What the Hopper kernels share: how tiles are found, masked, ended, and what a bulk copy needs. See `hopper.py`."""

from __future__ import annotations

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

ROWS = gl.constexpr(64)  # query rows of one computing group
NOTE = gl.constexpr(6)  # numbers that describe a tile
LN_2 = gl.constexpr(math.log(2))
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # their names before Triton 3.8
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
copy_out_wait = tma.store_wait

# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
UNSPECIALIZED = (
    *(
        "tiles",
        "n_q",
        "n_k",
        "heads",
        "n_tokens",
        "n_k_tokens",
        "ahead",
        "stride_cb",
        "stride_ch",
        "width",
    ),
    *("stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh", "threshold"),
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
def draw(drawn):
    """Draw a tile for a single warp, without waiting for its number: `open_ticket` does.

    Gluon's own scalar atomic passes its result through scratch memory that Triton lays over the arguments of warps that
    have not read them yet.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; mov.b32 $0, 0; "
        "@p atom.global.add.u32 $0, [$1], 1; }",
        "=r,l",
        [drawn.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def open_ticket(ticket):
    """How many tiles were drawn before: what one thread of `draw` was told, for all threads of the warp."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;",
        "=r,r",
        [ticket],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def find_tile(tile, places, heads, n_heads, ahead):
    """Place within its head, head and batch row of a tile.

    First the last places, `ahead` of them, of all heads: text that reads everything stands there, and a tile that
    takes long must not begin last. Then heads one after another, so that the keys of few are in use at a time. Where
    text stands first `ahead` is negative, and places count from the other end.
    """
    turned = ahead < 0
    ahead = gl.where(turned, -ahead, ahead)
    first = tile < ahead * n_heads
    tile = gl.where(first, tile, tile - ahead * n_heads)
    rest = places - ahead
    place = gl.where(first, places - 1 - tile // n_heads, rest - 1 - tile % rest)
    place = gl.where(turned, places - 1 - place, place)
    i_bh = gl.where(first, tile % n_heads, tile // rest)
    return place, i_bh % heads, i_bh // heads


@gluon.jit
def write_note(notes, copy, i_b, i_h, place, first, end, count):
    """Leave the computing groups word of a tile."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    notes.index(copy * NOTE + 0).store(gl.full([1], i_b, gl.int32, ONE))
    notes.index(copy * NOTE + 1).store(gl.full([1], i_h, gl.int32, ONE))
    notes.index(copy * NOTE + 2).store(gl.full([1], place, gl.int32, ONE))
    notes.index(copy * NOTE + 3).store(gl.full([1], first, gl.int32, ONE))
    notes.index(copy * NOTE + 4).store(gl.full([1], end, gl.int32, ONE))
    notes.index(copy * NOTE + 5).store(gl.full([1], count, gl.int32, ONE))


@gluon.jit
def read_note(notes, copy):
    """What `write_note` wrote."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i_b = gl.sum(notes.index(copy * NOTE + 0).load(ONE), 0)
    i_h = gl.sum(notes.index(copy * NOTE + 1).load(ONE), 0)
    place = gl.sum(notes.index(copy * NOTE + 2).load(ONE), 0)
    first = gl.sum(notes.index(copy * NOTE + 3).load(ONE), 0)
    end = gl.sum(notes.index(copy * NOTE + 4).load(ONE), 0)
    count = gl.sum(notes.index(copy * NOTE + 5).load(ONE), 0)
    return i_b, i_h, place, first, end, count


@gluon.jit
def look_up(
    place, i_h, i_b, counts, q_starts, PIECES: gl.constexpr, stride_cb, stride_ch, stride_qsb, stride_qsh
):
    """Start and end of a tile's query block and the length of its list, to be settled once they have come; and its row
    of the plan."""
    i_block = place // PIECES
    p_start = q_starts + i_b.to(gl.int64) * stride_qsb + i_h.to(gl.int64) * stride_qsh + i_block
    row = i_b.to(gl.int64) * stride_cb + i_h.to(gl.int64) * stride_ch + i_block
    return gl.load(p_start), gl.load(p_start + 1), gl.load(counts + row), row


@gluon.jit
def settle(place, low, high, count, PIECES: gl.constexpr, TILE_ROWS: gl.constexpr):
    """First row and end of a tile, and how many key blocks it reads. A long query block is cut in `PIECES`."""
    first = low + (place % PIECES) * TILE_ROWS
    return first, high, gl.where(first < high, count, 0)


@gluon.jit
def empty_rows(
    out, lse, i_b, i_h, first, end, heads, n_tokens, stride_ob, stride_oh, stride_os,
    HEAD: gl.constexpr,
    TILE_ROWS: gl.constexpr,
):  # fmt: skip
    """The loading warp's business: rows that read nothing are 0, their lse is -inf."""
    LINE: gl.constexpr = gl.BlockedLayout([HEAD // 32], [32], [1], [0])
    lanes = gl.arange(0, HEAD, layout=LINE)
    p_out = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    p_lse = lse + (i_b.to(gl.int64) * heads + i_h) * n_tokens
    for row in range(first, gl.minimum(end, first + TILE_ROWS)):
        nothing = gl.zeros([HEAD], out.dtype.element_ty, LINE)
        gl.store(p_out + row.to(gl.int64) * stride_os + lanes, nothing)
        gl.store(p_lse + row, -float("inf"))


@gluon.jit
def values_from(block, HEAD: gl.constexpr, BLOCK_N: gl.constexpr, FP8_VALUES: gl.constexpr):
    """A stage's values as an operand `[BLOCK_N, HEAD]`; in fp8 they are stored with channels outermost."""
    if FP8_VALUES:
        values = block.reshape([HEAD, BLOCK_N]).permute((1, 0))
    else:
        values = block.reshape([BLOCK_N, HEAD])
    return values


@gluon.jit
def _store_rows(rounded, p_out, low, end, stride_os, HEAD: gl.constexpr):
    """Write a tile's rows up to `end` from registers."""
    LAYOUT: gl.constexpr = rounded.type.layout
    rows = low + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    lanes = gl.arange(0, HEAD, layout=gl.SliceLayout(0, LAYOUT))
    p_rows = p_out + rows.to(gl.int64)[:, None] * stride_os + lanes[None, :]
    gl.store(p_rows, rounded, mask=(rows < end)[:, None])


@gluon.jit
def finish(
    acc, top, total, shift, low, end, i_b, i_h, o_smem, heads, result, v_scale,
    WHICH: gl.constexpr,
    HEAD: gl.constexpr,
    LAYOUT: gl.constexpr,
    SCALED: gl.constexpr,
    BULK: gl.constexpr,
):  # fmt: skip
    """Divide by the totals and write a tile's rows, from `low` on: in bulk, or if the block ends among them, or without
    BULK, one by one.

    shift: what is added to the lse; with SCALED every channel is multiplied by its `v_scale`.
    """
    o_desc, out, lse, n_tokens, _scale, stride_ob, stride_oh, stride_os = result
    empty = total == 0.0
    share = 1.0 / gl.where(empty, 1.0, total)
    b_lse = gl.where(empty, -float("inf"), (top + gl.log2(total)) * LN_2 + shift)
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, LAYOUT))[:, None]
    lanes = gl.arange(0, HEAD, layout=gl.SliceLayout(0, LAYOUT))
    if SCALED:
        acc = acc * gl.load(v_scale + (i_b * heads + i_h) * HEAD + lanes)[None, :]
    rounded = acc.to(out.dtype.element_ty)
    p_out = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    if BULK:
        if low + ROWS <= end:
            block = o_smem.index(WHICH)
            copy_out_wait(0)  # of the tile before
            block.reshape([ROWS, HEAD]).store(rounded)
            fence_async_shared()
            copy_out(o_desc, [i_b, i_h, low, 0], block)
        else:
            _store_rows(rounded, p_out, low, end, stride_os, HEAD)
    else:
        _store_rows(rounded, p_out, low, end, stride_os, HEAD)
    rows = low + gl.arange(0, ROWS, layout=top.type.layout)
    p_lse = lse + (i_b.to(gl.int64) * heads + i_h) * n_tokens
    gl.store(p_lse + rows, b_lse, mask=rows < end)
