"""Block-sparse attention forward for Hopper (sm_90) in Gluon: loading and computing warps, copies by TMA.

A program of twelve warps stays on its multiprocessor and draws one tile of 128 query rows after another, so that none
waits for others with longer lists. One warp draws and loads: it walks the tiles' lists, fills a ring of key and value
blocks, and leaves the others a note of each tile. Two groups of four warps compute, 64 query rows each. Two overlaps
keep the tensor cores busy while exponentials are taken, both from FlashAttention-3 (arXiv:2407.08608, sections 3.1 and
3.2):

- inside a group, `q k^T` of the next block is issued before the softmax of this one, and `p v` runs beneath it;
- between the groups, `go` lets one issue its products while the other takes its exponentials.

Tiles follow one another without a gap: the block after a tile's last one is the next tile's first, so its product and
its softmax run beneath the last `p v`, and what a short list would lose at its ends is not lost.

Key blocks of at most 64 rows are copied and multiplied as such, with the queries in registers: from shared memory they
would be read anew for each, as many bytes as the keys. Where query blocks too have at most 64 rows, the two groups go
their own ways: each has a loading warp, a ring and tiles of 64 rows, and lists of different length keep nobody waiting.

The arithmetic is that of `triton.py`. Rows behind a block's end are read with it, as part of a copy of fixed size, and
weighted with zero; only the end of the sequence is filled with zeros by the copy. So a NaN anywhere in the keys or
values of a head may reach any of its rows, as it does in dense attention. Heads and batch rows never mix.

The device's code: `hopper_kernel.py` (shared memory, and the roles are given out), `hopper_load.py` and
`hopper_attend.py` (the roles), `hopper_softmax.py`, `hopper_tiles.py` and `hopper_barriers.py`. docs/kernels.md says
how fast it is and what limits it. Quantised operands (`kernels/quantize`) take the same way:

- Scores of 8-bit integers are moved to 1.5 * 2^23 and up, where an integer's bits, read as a float, are its value: one
  addition, where a conversion would cost as much as the exponentials.
- A thread gets other columns of the scores than the product with 8-bit values takes from it. The keys of each sixteen
  are stored in the order (`quantize.KEY_ORDER`) in which both agree, and nothing moves between threads.
- fp8 weights are not taken by exponentials but written as bits that are linear in the score
  (`hopper_softmax.code_scores`): a multiplication, a rounding and a permutation, where the exponential, its conversion
  and the sum would take two thirds of the time. It costs up to 4 % of a weight, rms 1.8 %, beside the 2.7 % of fp8:
  on normal inputs int8_fp8 has a relative error of 0.042 instead of 0.039. Totals are products of the same weights
  with ones, so what is averaged still adds up to one.
- The tensor cores add fp8 products with about ten bits: over 600 blocks that would lose half of a sum. So every block's
  `p v` begins at zero and is added in fp32 (SageAttention2, arXiv:2411.10958, section 3.4).
- Every block's weights stand beside its own largest score, so what is 2^15 below the row's largest is kept where it is
  in another block.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.quantize import Quantised
from dit_accel.plan import BlockPlan, lead_strides

from .feedback import Feedback
from .hopper_barriers import LONE_STAGES
from .hopper_kernel import block_sparse_kernel
from .hopper_tiles import ROWS, bulk_strides, why_no_bulk_copy

FORMATS = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}
DTYPES = (torch.float16, torch.bfloat16)
HEADS = (64, 128)
KEY_ROWS = 128  # of one copy; no key block may be longer
REGISTERS = (232, 40)  # of a thread that computes and of one that loads
FP8_REGISTERS = (240, 24)  # with fp8 values, where each `p v` has accumulators of its own
AHEAD = 4  # of a head's last places, tiles that all heads take first; of few places a quarter
SHARED = 227 * 1024  # bytes of a multiprocessor that one program may have


@dataclass(frozen=True)
class Config:
    """A compiled shape of the kernel."""

    block_n: int  # key rows of one copy and one product; no key block is longer
    alone: (
        bool  # each computing group has tiles of 64 rows and a ring of its own, else both share tiles of 128
    )
    stages: int  # key and value blocks in a ring: as many as shared memory holds, at most as many as it has barriers
    consumer_registers: int
    producer_registers: int


def config_for(
    head: int,
    scores: torch.dtype = torch.bfloat16,
    values: torch.dtype = torch.bfloat16,
    longest_q: int = 128,
    longest_k: int = KEY_ROWS,
) -> Config:
    """The one configuration for this head size, these formats and the longest blocks of a plan.

    Quantised copies have 128 rows a block, whatever they hold.
    """
    full = scores.itemsize == 2
    block_n = 64 if full and longest_k <= 64 else KEY_ROWS
    alone = block_n == 64 and longest_q <= ROWS.value
    tile = ROWS.value * head
    queries = (
        (2 if alone else 4) * tile * scores.itemsize
    )  # for each group one copy, or this tile's and the next one's
    rows = 0 if alone else 2 * tile * 2  # of the output
    block = block_n * head * (scores.itemsize + values.itemsize)
    room = (SHARED - queries - rows - 2048) // block
    stages = min(LONE_STAGES.value, room // 2) if alone else min(4, room)
    registers = FP8_REGISTERS if values == torch.float8_e4m3fn else REGISTERS
    return Config(block_n, alone, stages, *registers)


def why_not(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
    """Why this kernel cannot run, or None. q, k, v: `[B, H, S, D]`."""
    if q.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {q.dtype}."
    if q.shape[3] not in HEADS:
        return f"head size {q.shape[3]} is not one of {', '.join(map(str, HEADS))}."
    if plan.max_k_block > KEY_ROWS:
        return f"key blocks of up to {plan.max_k_block} tokens are longer than {KEY_ROWS}."
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}; it runs on CUDA devices."
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return f"{torch.cuda.get_device_name(q.device)} is not a Hopper GPU (sm_90)."
    return why_no_bulk_copy("q", q) or why_no_bulk_copy("k", k) or why_no_bulk_copy("v", v)


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, feedback: Feedback | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the current stream. Arguments and results as in `reference.block_sparse`."""
    if scale <= 0:  # the maximum is taken before scaling
        q, scale = -q, max(-scale, 1e-30)
    return _launch(q, k, v, None, plan, scale, q, feedback)


def block_sparse_quantised(
    parts: Quantised, plan: BlockPlan, scale: float, like: Tensor, feedback: Feedback | None = None
) -> tuple[Tensor, Tensor]:
    """As `block_sparse`, from quantised copies; `out` is shaped and typed as `like`. The scale must be positive."""
    return _launch(parts.q8, parts.k8, parts.v8, parts, plan, scale, like, feedback)


def _launch(
    q,
    k,
    v,
    parts: Quantised | None,
    plan: BlockPlan,
    scale: float,
    like: Tensor,
    feedback: Feedback | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, n_q, head = like.shape
    out = torch.empty_like(like)
    lse = torch.empty(batch, heads, n_q, dtype=torch.float32, device=q.device)
    counts, indices = plan.counts.contiguous(), plan.indices.contiguous()
    config = config_for(head, q.dtype, v.dtype, plan.max_q_block, plan.max_k_block)
    rows, key_rows, groups = ROWS.value, config.block_n, 1 if config.alone else 2
    fp8_values = v.dtype == torch.float8_e4m3fn
    pieces = max(1, -(-plan.max_q_block // (groups * rows)))
    scales = (parts.q_scale, parts.k_scale, parts.v_scale, parts.shift) if parts else (lse,) * 4  # not read
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    drawn = torch.zeros(1, dtype=torch.int32, device=q.device)  # how many tiles the programs have drawn
    places = plan.n_q * pieces
    tiles, ahead = batch * heads * places, min(AHEAD, places // 4) * (-1 if plan.longest_first else 1)
    programs = min(tiles if groups == 2 else -(-tiles // 2), processors)
    needed, threshold = lse, 0.0  # not read
    if feedback is not None:
        # With fp8 values a row's maximum is rounded up to a whole power of two.
        needed, threshold = feedback.needed.view(torch.int8), feedback.threshold - fp8_values
    with torch.cuda.device(q.device):
        block_sparse_kernel[(programs,)](
            _describe(q, (rows, head)),
            _describe(k, (key_rows, head)),
            _describe(v, (head, key_rows) if fp8_values else (key_rows, head)),
            _describe(out, (rows, head)),
            *(out, lse, counts, indices, plan.q_starts, plan.k_starts, drawn, *scales),
            *(needed, threshold),
            *(tiles, plan.n_q, plan.n_k, heads, n_q, plan.n_k_tokens, ahead, scale * math.log2(math.e)),
            *(*lead_strides(counts), indices.shape[3]),
            *(*lead_strides(plan.q_starts), *lead_strides(plan.k_starts)),
            *out.stride()[:3],
            HEAD=head,
            BLOCK_N=key_rows,
            STAGES=config.stages,
            PIECES=pieces,
            EVEN=plan.even_k and plan.max_k_block == key_rows,
            SCALED=parts is not None,
            INTEGERS=q.dtype == torch.int8,
            FP8_VALUES=fp8_values,
            FEEDBACK=feedback is not None,
            ALONE=config.alone,
            CONSUMER_REGISTERS=config.consumer_registers,
            PRODUCER_REGISTERS=config.producer_registers,
            num_warps=4,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
    return out, lse


@functools.lru_cache
def shared_layout(block: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a copied block `[1, 1, *block]` lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, *block], FORMATS[dtype])


def _describe(x: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """All four dimensions: a copy that runs past the end of a head gets zeros, never the next head's tokens."""
    return TensorDescriptor(
        x, list(x.shape), [*bulk_strides(x), 1], [1, 1, *block], shared_layout(block, x.dtype)
    )
