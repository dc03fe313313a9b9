"""Block-sparse attention on the CPU: gathers the kept keys of one query block and works on those alone.

One query block of one head at a time: a few hundred kilobytes of scores, which stay in the cache between the first
product, the softmax and the second product. Everything is computed in float32 (float64 for float64 inputs), also for
bfloat16 and float16, which CPUs multiply slower than they convert.

Heads are spread over threads that each compute alone. The usual way, all threads sharing every small product, makes
them wait for one another a thousand times a call: a third slower on idle cores, several times slower on busy ones. More
than a few such threads wait for the interpreter instead, so that with more of them groups of query blocks are computed
together (`cpu_groups.py`).

Where torch was built with oneDNN its matrix product is called by name: `torch.matmul` goes to MKL, which leaves half
of a non-Intel CPU's vector width unused (measured on Zen 5: 100 against 200 GFLOP/s for one core at these sizes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan

from .cpu_groups import attend_in_groups, list_blocks
from .feedback import Feedback

ALONE = 3  # threads that compute alone, at most
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    feedback: Feedback | None = None,
    pv_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks only, on as many threads as `torch.get_num_threads()` says.

    Arguments and results as in `reference.block_sparse`. The result does not depend on the number of threads, but for
    rounding between up to `ALONE` of them and more.
    """
    batch, heads, n_q, _ = q.shape
    lse = torch.empty(batch, heads, n_q, dtype=_working_type(q))
    threads = torch.get_num_threads()
    if threads > ALONE and feedback is None and pv_threshold is None:
        return _grouped(q, k, v, plan, scale, lse, threads), lse
    out = torch.empty_like(q)
    before, threads = threads, min(threads, ALONE)
    # Two shares for each thread, so that a thread that finishes early has something left to take.
    shares = min(plan.n_q, -(-2 * threads // (batch * heads)))
    jobs = [
        (b, h, range(plan.n_q * share // shares, plan.n_q * (share + 1) // shares))
        for b in range(batch)
        for h in range(heads)
        for share in range(shares)
    ]
    attend = partial(_attend_rows, q, k, v, plan, scale, out, lse, feedback, pv_threshold)
    if threads == 1:
        for job in jobs:
            attend(job)
        return out, lse
    # Whether torch is in inference mode is known per thread; `out` can be written only in the mode it was made in.
    inference = torch.is_inference_mode_enabled()

    def attend_alone(job: tuple[int, int, range]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            attend(job)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(attend_alone, jobs))
    finally:
        # A worker's number holds for itself, but also becomes the default of threads started later.
        torch.set_num_threads(before)
    return out, lse


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, lse: Tensor, threads: int
) -> Tensor:
    """All heads in groups; `lse` is written."""
    dtype, (batch, heads, n_q, _), n_k = _working_type(q), q.shape, k.shape[2]
    blocks = []
    for b in range(batch):
        for h in range(heads):
            kept = [one for one, _ in _kept_tokens(plan, b, h, range(plan.n_q))]
            at = b * heads + h
            blocks += list_blocks(plan, _of(plan.q_starts, b, h), kept, at * n_q, at * n_k)
    out = torch.zeros(q.shape, dtype=q.dtype)
    attend_in_groups(q.to(dtype), k.to(dtype), v.to(dtype), blocks, scale, out, lse.fill_(-torch.inf), threads)
    return torch.empty_like(q).copy_(out)  # laid out as the queries are


def _attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    out: Tensor,
    lse: Tensor,
    feedback: Feedback | None,
    pv_threshold: float | None,
    job: tuple[int, int, range],
) -> None:
    """Write `out` and `lse` for a run of query blocks of one head; `job` is (batch row, head, query blocks)."""
    b, h, blocks = job
    dtype = _working_type(q)
    product = _product(dtype)
    starts = _of(plan.q_starts, b, h)[blocks.start : blocks.stop + 1].tolist()
    base, rows = starts[0], slice(starts[0], starts[-1])
    # One contiguous copy also makes whatever strides and type came in cheap to gather from.
    b_q = q[b, h, rows].to(dtype) * (scale * LOG2_E)
    b_k = k[b, h].to(dtype).contiguous()
    b_v = v[b, h].to(dtype).contiguous()
    acc = torch.zeros_like(b_q, memory_format=torch.contiguous_format)
    top = torch.full((len(b_q), 1), -torch.inf, dtype=dtype)
    total = torch.ones(len(b_q), 1, dtype=dtype)
    listed = _kept_tokens(plan, b, h, blocks)
    for block, (first, last), (kept, lengths) in zip(blocks, pairwise(starts), listed, strict=True):
        if feedback is not None and first < last and lengths:
            feedback.needed[b, h, block, len(lengths) - 1] = 1  # what is visited first
        if first == last or len(kept) == 0:
            continue
        own = slice(first - base, last - base)
        scores = product(b_q[own], b_k.index_select(0, kept))
        if feedback is not None:
            _judge(scores, lengths, feedback.threshold, feedback.needed[b, h, block])
        if pv_threshold is not None:
            worth = torch.zeros(len(lengths), dtype=torch.bool)
            _judge(scores, lengths, pv_threshold, worth)
            if not bool(worth.all()):
                stays = worth.repeat_interleave(torch.tensor(lengths))
                scores, kept = scores[:, stays], kept[stays]
        peak = torch.amax(scores, -1, keepdim=True, out=top[own])
        weights = scores.sub_(peak).exp2_()
        torch.sum(weights, -1, keepdim=True, out=total[own])
        acc[own] = product(weights, b_v.index_select(0, kept).T)
    torch.div(acc, total, out=out[b, h, rows])
    torch.add(top[:, 0], total[:, 0].log2_(), out=lse[b, h, rows]).mul_(LN_2)


def _judge(scores: Tensor, lengths: list[int], threshold: float, needed: Tensor) -> None:
    """Mark which of a list's entries mattered. scores: `[rows, tokens of the list]`, in powers of two."""
    top = None
    parts = scores.split(lengths, dim=1)
    for slot in range(len(lengths) - 1, -1, -1):
        if lengths[slot]:
            peak = parts[slot].amax(1)
            if top is None or not bool((peak <= top + threshold).all()):  # a NaN matters
                needed[slot] = 1
            top = peak if top is None else torch.maximum(top, peak)


def _kept_tokens(plan: BlockPlan, b: int, h: int, blocks: range) -> Iterator[tuple[Tensor, list[int]]]:
    """What each of these query blocks reads: its key tokens, int32 positions, and how many of each list entry."""
    counts = _of(plan.counts, b, h)[blocks.start : blocks.stop]
    indices = _of(plan.indices, b, h)[blocks.start : blocks.stop]
    starts = _of(plan.k_starts, b, h)
    valid = torch.arange(indices.shape[1]) < counts[:, None]
    lengths = torch.where(valid, starts.diff()[indices], 0)  # [Nq, M]
    # Within one kept block position = slot + (block start - slot of its first token); the bracket is constant.
    ends = lengths.flatten().cumsum(0)
    shift = starts[indices].flatten() - (ends - lengths.flatten())
    positions = torch.arange(int(ends[-1])) + shift.repeat_interleave(lengths.flatten())
    kept = positions.to(torch.int32).split(lengths.sum(1).tolist())
    return zip(kept, (row[:n] for row, n in zip(lengths.tolist(), counts.tolist(), strict=True)), strict=True)


def _of(tensor: Tensor, b: int, h: int) -> Tensor:
    """One head's part of a plan tensor, where one entry may stand for all."""
    return tensor[min(b, tensor.shape[0] - 1), min(h, tensor.shape[1] - 1)]


def _working_type(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _product(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """`product(a [M, D], b [N, D]) -> a b^T [M, N]`, by the fastest means for this type."""
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if linear is not None:
            return lambda a, b: linear.default(a, b, None, "none", [], "")
    return lambda a, b: a @ b.T
