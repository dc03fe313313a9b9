"""The softmax of a computing group's block of scores, in registers. See `hopper.py`.

A thread holds two rows of the scores, of each eight columns the same two. Reductions first go over what a thread holds,
as several short chains that run beside one another, then over the four threads of a row; totals are kept for each
thread and meet when the tile ends. Between loop turns weights are carried as packed 32-bit words: as 16- or 8-bit
numbers they would be taken apart and put together again in every turn.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_tiles import ROWS
from .reference import CODE_BIAS

INTEGER_ZERO = gl.constexpr(0x4B400000)  # the bits of 1.5 * 2^23
FLOAT_ZERO = gl.constexpr(12582912.0)
INTEGER_NOTHING = gl.constexpr(-0x4BC00000)  # an integer that becomes -inf when INTEGER_ZERO is added to it
WEIGHT_BITS = gl.constexpr(8.0)  # fp8 weights are scaled by two to this power
CODES = gl.constexpr(8.0)  # fp8 (e4m3) numbers between two powers of two
CODE_OF_ONE = gl.constexpr(120 - CODE_BIAS)  # of a weight of 1, which is scaled to 2^8: its bits are 120
LAG = gl.constexpr(12.0)  # powers of two that a block's anchor may stand below the row's largest weight


@gluon.jit
def in_threads(scores, BLOCK_N: gl.constexpr):
    """`[ROWS, BLOCK_N]` as `[ROWS, chain, link, thread, pair]`."""
    return scores.reshape([ROWS, 4, BLOCK_N // 32, 4, 2])


@gluon.jit
def max_of_rows(scores, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """The largest score of each row."""
    peaks = gl.max(gl.max(gl.max(in_threads(scores, BLOCK_N), 4), 2), 1)
    return gl.convert_layout(gl.max(peaks, 1), LAYOUT)


@gluon.jit
def sum_parts(weights, BLOCK_N: gl.constexpr):
    """Each thread's part of the rows' sums: `[ROWS, 4]`."""
    return gl.sum(gl.sum(gl.sum(in_threads(weights, BLOCK_N), 4), 2), 1)


@gluon.jit
def halves(x, BLOCK_N: gl.constexpr):
    """The first and the second half of the columns."""
    return gl.split(x.reshape([ROWS, 2, BLOCK_N // 2]).permute((0, 2, 1)))


@gluon.jit
def pin(sums):
    """`sums`, with a store that never happens (no sum of weights has these bits) but must stay where it is.

    Before a wait it keeps what `sums` is made of before that wait, where a product runs beneath it. Where the loop
    branches the assembler would move all of it behind.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a, b; mov.b32 a, 0; mov.b32 b, $1; setp.eq.u32 p, b, 0xffc0dead; "
        "@p st.shared.b32 [a], b; mov.b32 $0, b; }",
        "=f,f",
        [sums],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def whole(first, second, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """What `halves` took apart."""
    return gl.convert_layout(gl.join(first, second).permute((0, 2, 1)).reshape([ROWS, BLOCK_N]), LAYOUT)


@gluon.jit
def find_peak(
    scores, length, row_layout: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MASKED: gl.constexpr,
    INTEGERS: gl.constexpr,
    FP8_VALUES: gl.constexpr,
):  # fmt: skip
    """Of one block: the scores as floats (integers as `FLOAT_ZERO` and what they are), and each row's largest.

    length: tokens of the block; looked at with MASKED alone.
    """
    LAYOUT: gl.constexpr = scores.type.layout
    if MASKED:
        if length < BLOCK_N:
            scores = mask_behind(
                scores, length, INTEGER_NOTHING if INTEGERS else -float("inf"), BLOCK_N, FP8_VALUES, LAYOUT
            )
    peak = max_of_rows(scores, BLOCK_N, row_layout)
    if INTEGERS:
        peak = peak.to(gl.float32)
        scores = (scores + INTEGER_ZERO).to(gl.float32, bitcast=True)
    return scores, peak


@gluon.jit
def shift_scores(scores, peak, top, factor, SCALED: gl.constexpr, INTEGERS: gl.constexpr):
    """Of one block: the weights' powers of two, `factor s - m'`; the new maximum; by what older parts fade.

    factor: one number, or with SCALED one for each row.
    """
    new_top = gl.maximum(top, peak * factor)
    # While a row has met no key its maximum is -inf, and -inf - -inf would be NaN.
    anchor = gl.where(new_top == -float("inf"), 0.0, new_top)
    below = -anchor
    if INTEGERS:
        below = below - FLOAT_ZERO * factor
    if SCALED:
        powers = gl.fma(scores, factor[:, None], below[:, None])
    else:
        powers = gl.fma(scores, factor, below[:, None])
    return powers, new_top, gl.exp2(top - anchor)


@gluon.jit
def code_scores(scores, peak, top, anchor, factor, INTEGERS: gl.constexpr):
    """Of one block: the fp8 weights' codes; the new maximum, a whole power of two; the new anchor; and by what older
    parts, which stood below the old anchor, fade.

    An e4m3 number's bits, read as an integer, are a line between two powers of two; so bits that are linear in the
    score are weights that are exponential in it, but for up to 4 % (see `hopper.py`). They come as multiples of 2^-24,
    which rounding to fp16 makes integers of. Every block has an anchor of its own: fp8 holds 2^15, a row more.
    """
    rises = gl.ceil(peak * factor)
    new_top = gl.maximum(top, rises)
    new_anchor = gl.maximum(rises, new_top - LAG)
    # While a row has met no key its maximum is -inf, and -inf - -inf would be NaN.
    new_anchor = gl.where(new_top == -float("inf"), 0.0, new_anchor)
    fine: gl.constexpr = CODES * 2.0**-24
    slope = factor * fine
    below = CODE_OF_ONE * 2.0**-24 - new_anchor * fine
    if INTEGERS:
        below = below - FLOAT_ZERO * slope
    codes = gl.fma(scores, slope[:, None], below[:, None])
    # Bounded for a row that had met no key: nothing times a large number.
    return codes, new_top, new_anchor, gl.exp2(gl.minimum(anchor - new_anchor, LAG))


@gluon.jit
def in_token_order(x, BLOCK_N: gl.constexpr):
    """Columns of scores of 8-bit keys, which are stored in `quantize.KEY_ORDER`, in the order of the tokens."""
    return x.reshape([ROWS, BLOCK_N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, BLOCK_N])


@gluon.jit
def mask_behind(
    scores, length, nothing, BLOCK_N: gl.constexpr, IN_KEY_ORDER: gl.constexpr, LAYOUT: gl.constexpr
):
    """Scores of tokens from `length` on become `nothing`.

    A thread holds a few columns of every group of eight (in key order: of sixteen). Comparing those with what is left
    of the length in each group takes as many registers; comparing all its columns with the length would keep all their
    numbers in registers.
    """
    GROUP: gl.constexpr = 16 if IN_KEY_ORDER else 8
    if IN_KEY_ORDER:
        scores = in_token_order(scores, BLOCK_N)
    grouped = scores.reshape([ROWS, BLOCK_N // GROUP, GROUP])
    GROUPED: gl.constexpr = grouped.type.layout
    group = gl.arange(0, BLOCK_N // GROUP, layout=gl.SliceLayout(0, gl.SliceLayout(2, GROUPED)))
    within = gl.arange(0, GROUP, layout=gl.SliceLayout(0, gl.SliceLayout(1, GROUPED)))
    kept = within[None, None, :] < (length - GROUP * group)[None, :, None]
    scores = gl.where(kept, grouped, nothing).reshape([ROWS, BLOCK_N])
    if IN_KEY_ORDER:
        scores = scores.reshape([ROWS, BLOCK_N // 16, 4, 2, 2]).permute((0, 1, 3, 2, 4))
        scores = scores.reshape([ROWS, BLOCK_N])
    return gl.convert_layout(scores, LAYOUT)


@gluon.jit
def pack_codes(codes, BLOCK_N: gl.constexpr):
    """Codes of `code_scores`, rounded, none below 0, four neighbours in 32 bits: int32 `[ROWS, BLOCK_N // 4]`."""
    codes = in_token_order(codes, BLOCK_N)
    even, odd = gl.split(codes.reshape([ROWS, BLOCK_N // 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 low, high; cvt.rn.relu.f16x2.f32 low, $2, $1; cvt.rn.relu.f16x2.f32 high, $4, $3; "
        "prmt.b32 $0, low, high, 0x6420; }",
        "=r,f,f,f,f",
        [first, second, third, fourth],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def pack_weights(weights, dtype: gl.constexpr, BLOCK_N: gl.constexpr):
    """Weights rounded to `dtype`, of 16 bits, two neighbours in 32: int32 `[ROWS, BLOCK_N // 2]`."""
    even, odd = gl.split(weights.reshape([ROWS, BLOCK_N // 2, 2]))
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;",
        "=r,f,f",
        [even, odd],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def unpack_weights(packed, dtype: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """What `pack_weights` packed, as an operand of a product: `[ROWS, BLOCK_N]` of `dtype`."""
    # In the order of the operand's registers, of which the words' copies fill one each. The name of the type has to
    # stand in each call: a parameter is not taken.
    if dtype == gl.float8e4nv:
        twice = gl.join(packed, packed)
        words = gl.convert_layout(gl.join(twice, twice).reshape([ROWS, BLOCK_N]), LAYOUT)
        weights = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [words], dtype=gl.float8e4nv, is_pure=True, pack=4
        )
    else:
        words = gl.convert_layout(gl.join(packed, packed).reshape([ROWS, BLOCK_N]), LAYOUT)
        if dtype == gl.bfloat16:
            weights = gl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r,r", [words], dtype=gl.bfloat16, is_pure=True, pack=2
            )
        else:
            weights = gl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r,r", [words], dtype=gl.float16, is_pure=True, pack=2
            )
    return weights


@gluon.jit
def hold_queries(queries, HEAD: gl.constexpr):
    """Queries of 16 bits as `pack_weights` packs weights, to be held in registers: int32 `[ROWS, HEAD // 2]`.

    Not pure: what comes after it in the source happens after the queries were read.
    """
    twice = gl.inline_asm_elementwise(
        "mov.b32 $0, $2; mov.b32 $1, $2;", "=r,=r,r", [queries], dtype=gl.int32, is_pure=False, pack=2
    )
    words, _same = gl.split(twice.reshape([ROWS, HEAD // 2, 2]))
    return words
