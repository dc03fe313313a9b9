"""Block-sparse attention as a masked softmax: the oracle every other implementation is judged by.

    s = scale * q k^T        where the query token's block keeps the key token's block, else -inf
    lse = log sum exp(s)     natural log
    out = exp(s - lse) v     0 where a row keeps nothing (lse is -inf there)

It computes in the dtype of its inputs (float64 for an exact answer, bfloat16 for the error that dtype costs anyone)
and skips nothing; what `pv_threshold` leaves out it weighs with zero. Scores are formed for a limited number of query
rows at a time, so memory grows with N, not N^2.
"""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel.kernels.quantize import ROWS, Quantised
from dit_accel.kernels.quantize.reference import in_key_order
from dit_accel.plan import BlockPlan

from .feedback import Feedback

LN_2 = math.log(2)
CODE_BIAS = 0.46  # of an eighth of a power of two: what 1 + x is more than 2^x, 0 <= x < 1, in the mean
# Scores held at once, per batch row and head; 2^22 of them are 32 MB in float64.
SCORES_AT_ONCE = 1 << 22


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    feedback: Feedback | None = None,
    pv_threshold: float | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked attention.

    Args:
        q: `[B, H, Sq, D]`, any floating dtype, any strides.
        k, v: `[B, H, Sk, D]`.
        plan: which key blocks each query block reads.
        scale: factor of the scores.
        feedback: if given, which entries mattered is written into it.
        pv_threshold: if given, tiles below it are left out (`leave_out`).
        tile: rows and keys of such a tile; None is a whole query block and a whole key block.

    Returns:
        `out [B, H, Sq, D]` in q's dtype and `lse [B, H, Sq]` (float64 for float64 inputs, else float32).
    """
    batch, heads, n_q, _ = q.shape
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q)
    lse = torch.full((batch, heads, n_q), -torch.inf, dtype=acc_dtype, device=q.device)
    mask = plan.to_mask().expand(batch, heads, -1, -1)
    q_owner = _owners(plan.q_starts, n_q).expand(batch, heads, -1)
    k_owner = _owners(plan.k_starts, k.shape[2]).expand(batch, heads, -1)
    rows = max(1, SCORES_AT_ONCE // k.shape[2])
    for b in range(batch):
        for h in range(heads):
            cuts = [*range(0, n_q, rows), n_q]
            if pv_threshold is not None:  # a tile needs all of its rows
                cuts = plan.q_starts.expand(batch, heads, -1)[b, h].tolist()
                keys = plan.k_starts.expand(batch, heads, -1)[b, h].tolist()
            for own in itertools.starmap(slice, pairwise(cuts)):
                keep = mask[b, h][q_owner[b, h, own]][:, k_owner[b, h]]
                scores = (q[b, h, own] @ k[b, h].T * scale).masked_fill(~keep, -torch.inf).to(acc_dtype)
                if pv_threshold is not None:
                    leave_out(scores, list(pairwise(keys)), pv_threshold * LN_2, tile)
                lse[b, h, own] = scores.logsumexp(dim=-1)
                # An empty row has lse -inf; its weights exp(-inf - 0) are the zeros it should have.
                weights = (scores - lse[b, h, own].clamp_min(torch.finfo(acc_dtype).min)[:, None]).exp()
                out[b, h, own] = weights.to(v.dtype) @ v[b, h]
    if feedback is not None:
        feedback.needed.copy_(margins(q, k, plan, scale) > feedback.threshold)
    return out, lse


def leave_out(
    scores: Tensor, blocks: list[tuple[int, int]], threshold: float, tile: tuple[int, int] | None = None
) -> None:
    """Set to minus infinity what `pv_threshold` leaves out of one query block's scores.

    Key blocks are visited last to first, the steps of one from its first token on. A tile is left out if in no row a
    score comes above the row's largest one before, plus the threshold; a NaN does.

    Args:
        scores: `[rows, keys]`, minus infinity where a key is not listed.
        blocks: where each key block begins and ends.
        threshold: at most 0, in the scores' unit.
        tile: rows and keys of a tile; None is all rows and a whole key block.
    """
    n_rows, n_keys = tile or (max(1, scores.shape[0]), max(1, scores.shape[1]))
    for part in scores.split(n_rows):
        top = part.new_full((part.shape[0],), -torch.inf)
        for first, end in reversed(blocks):
            for low in range(first, end, n_keys):
                step = part[:, low : min(low + n_keys, end)]
                peak = step.amax(1)
                if bool((peak <= top + threshold).all()):
                    step.fill_(-torch.inf)
                else:
                    top = torch.maximum(top, peak)


def margins(q: Tensor, k: Tensor, plan: BlockPlan, scale: float) -> Tensor:
    """By how many powers of two each list entry rose above what its rows had seen before, in the row where most.

    Lists are visited last to first; a row that had seen nothing gives infinity, as does the entry visited first, and
    an entry without a token gives minus infinity. `Feedback.threshold` is compared with it.

    Returns:
        `[B, H, Nq, M]` beside the plan's `indices`, minus infinity behind the counts and for blocks without a row.
    """
    batch, heads = q.shape[:2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = torch.full((batch, heads, *plan.indices.shape[2:]), -torch.inf, dtype=dtype, device=q.device)
    lead = (batch, heads, -1)
    q_starts, k_starts, counts = (t.expand(lead) for t in (plan.q_starts, plan.k_starts, plan.counts))
    indices = plan.indices.expand(*lead, -1)
    for b in range(batch):
        for h in range(heads):
            rows, keys = q_starts[b, h].tolist(), k_starts[b, h].tolist()
            for i, (first, end) in enumerate(pairwise(rows)):
                count = int(counts[b, h, i])
                if first == end or count == 0:
                    continue
                listed = indices[b, h, i, :count].tolist()
                scores = (q[b, h, first:end] @ k[b, h].T * scale).to(dtype) / LN_2
                parts = [scores[:, keys[j] : keys[j + 1]] for j in listed]
                nothing = scores.new_full((end - first,), -torch.inf)
                peaks = torch.stack([p.amax(1) if p.shape[1] else nothing for p in parts], 1)
                before = peaks.flip(1).cummax(1).values.flip(1)[:, 1:]
                rise = torch.where(peaks[:, :-1].isneginf(), -torch.inf, peaks[:, :-1] - before)
                found[b, h, i, : count - 1] = rise.amax(0)
                found[b, h, i, count - 1] = torch.inf
    return found


def _owners(starts: Tensor, n_tokens: int) -> Tensor:
    """The block each token belongs to, `[B|1, H|1, n_tokens]`: the last one that starts at or before it."""
    token = torch.arange(n_tokens, device=starts.device)
    return (starts[..., None, 1:] <= token[:, None]).sum(dim=-1)


def fp8_weights(powers: Tensor) -> Tensor:
    """About `2 ** powers`, as a number of fp8's three bits behind the point.

    Between two powers of two it is linear, where `2 ** x` is not: up to 4 % less and 2 % more, in the mean neither
    (Schraudolph, "A Fast, Compact Approximation of the Exponential Function", 1999; here with the rounding to fp8 in
    the same step). The exponent is not bounded as fp8's is: the kernel gives every block of keys an anchor of its own.
    """
    codes = (powers * 8 - CODE_BIAS).round()
    octave = (codes / 8).floor()
    return octave.exp2() * (1 + codes / 8 - octave).nan_to_num(0.0)


def block_sparse_quantised(
    parts: Quantised,
    plan: BlockPlan,
    scale: float,
    like: Tensor,
    pv_threshold: float | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention from quantised copies: what every implementation of a mode computes, with weights rounded as they are.

    N x N, for tests. Arguments and results as in `hopper.block_sparse_quantised`; `pv_threshold` and `tile` as in
    `block_sparse`, for modes without 8-bit values.
    """
    keys, values = parts.k8.float(), parts.v8.float()
    if parts.mode.values is not None:
        values = values.transpose(2, 3)
        in_order = torch.empty_like(keys).unflatten(2, (-1, ROWS))
        in_order[..., in_key_order(keys.device), :] = keys.unflatten(2, (-1, ROWS))
        keys = in_order.flatten(2, 3)
    scores = parts.q8.float() @ keys.transpose(2, 3) * parts.q_scale[..., None]
    scores = scores * parts.k_scale.repeat_interleave(ROWS, 2)[:, :, None] * scale
    slot = torch.arange(ROWS, device=scores.device)
    lead = (*parts.q8.shape[:2], -1)
    q_lengths, k_lengths = (s.diff().expand(lead) for s in (plan.q_starts, plan.k_starts))
    read = plan.to_mask().expand(*lead, -1).repeat_interleave(ROWS, 2).repeat_interleave(ROWS, 3)
    scores.masked_fill_(~(read & (slot < k_lengths[..., None]).flatten(2)[:, :, None]), -torch.inf)
    if pv_threshold is not None:
        for b, h, i in itertools.product(*map(range, (*parts.q8.shape[:2], plan.n_q))):
            own = scores[b, h, i * ROWS : i * ROWS + int(q_lengths[b, h, i])]
            blocks = [(j * ROWS, j * ROWS + n) for j, n in enumerate(k_lengths[b, h].tolist())]
            leave_out(own, blocks, pv_threshold * LN_2, tile)
    top = scores.amax(-1, keepdim=True)
    if parts.mode.values is not None:
        top = (top / LN_2).ceil() * LN_2
        weights = fp8_weights((scores - top.clamp(min=torch.finfo(torch.float32).min)) / LN_2)
        total = weights.sum(-1, keepdim=True)
    else:
        weights = (scores - top.clamp(min=torch.finfo(torch.float32).min)).exp()
        total = weights.sum(-1, keepdim=True)
        weights = weights.to(like.dtype).float()
    out = weights @ values / total.masked_fill(total == 0, 1) * parts.v_scale[:, :, None]
    lse = (top + total.log())[..., 0] + parts.shift * scale
    there = (slot < q_lengths[..., None]).flatten(2)
    shape = like.shape
    return out[there].view(shape).to(like.dtype), lse[there].view(shape[:3])
