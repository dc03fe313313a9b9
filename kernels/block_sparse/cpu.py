"""Block-sparse attention on the CPU: gathers the kept keys of one query block and works on those alone.

One query block of one head at a time: a few hundred kilobytes of scores, which stay in the cache between the first
product, the softmax and the second product. Everything is computed in float32 (float64 for float64 inputs), also for
bfloat16 and float16, which CPUs multiply slower than they convert.

Where torch was built with oneDNN its matrix product is called by name: `torch.matmul` goes to MKL, which leaves half
of a non-Intel CPU's vector width unused (measured on Zen 5: 100 against 200 GFLOP/s for one core at these sizes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan

LOG2_E = math.log2(math.e)


def block_sparse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks only. Arguments and results as in `reference.block_sparse`."""
    batch, heads, n_q, dim = q.shape
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    product = _product(acc_dtype)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, n_q, dtype=acc_dtype)
    q_starts = plan.q_starts.expand(batch, heads, -1).tolist()
    tokens = {}
    for b in range(batch):
        for h in range(heads):
            row = min(b, plan.lead[0] - 1), min(h, plan.lead[1] - 1)
            if row not in tokens:
                tokens = {row: _kept_tokens(plan, *row)}
            # One contiguous copy per head also makes whatever strides and dtype came in cheap to gather from.
            b_q = q[b, h].to(acc_dtype) * (scale * LOG2_E)
            b_k = k[b, h].to(acc_dtype).contiguous()
            b_v = v[b, h].to(acc_dtype).contiguous()
            acc = torch.zeros(n_q, dim, dtype=acc_dtype)
            top = torch.full((n_q, 1), -torch.inf, dtype=acc_dtype)
            total = torch.ones(n_q, 1, dtype=acc_dtype)
            starts = q_starts[b][h]
            for first, last, kept in zip(starts, starts[1:], tokens[row], strict=False):
                if first == last or len(kept) == 0:
                    continue
                scores = product(b_q[first:last], b_k.index_select(0, kept))
                peak = torch.amax(scores, -1, keepdim=True, out=top[first:last])
                weights = scores.sub_(peak).exp2_()
                torch.sum(weights, -1, keepdim=True, out=total[first:last])
                acc[first:last] = product(weights, b_v.index_select(0, kept).T)
            torch.div(acc, total, out=out[b, h])
            torch.add(top[:, 0], total[:, 0].log2_(), out=lse[b, h])
    return out, lse.mul_(math.log(2))


def _kept_tokens(plan: BlockPlan, b: int, h: int) -> tuple[Tensor, ...]:
    """The key tokens each query block reads: one int32 tensor of positions per query block."""
    counts, indices = (t[min(b, t.shape[0] - 1), min(h, t.shape[1] - 1)] for t in (plan.counts, plan.indices))
    starts = plan.k_starts[min(b, plan.k_starts.shape[0] - 1), min(h, plan.k_starts.shape[1] - 1)]
    valid = torch.arange(indices.shape[1]) < counts[:, None]
    lengths = torch.where(valid, starts.diff()[indices], 0)  # [Nq, M]
    # Within one kept block position = slot + (block start - slot of its first token); the bracket is constant.
    ends = lengths.flatten().cumsum(0)
    shift = starts[indices].flatten() - (ends - lengths.flatten())
    positions = torch.arange(int(ends[-1])) + shift.repeat_interleave(lengths.flatten())
    return positions.to(torch.int32).split(lengths.sum(1).tolist())


def _product(dtype: torch.dtype):
    """`product(a [M, D], b [N, D]) -> a b^T [M, N]`, by the fastest means for this dtype."""
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if linear is not None:
            return lambda a, b: linear.default(a, b, None, "none", [], "")
    return lambda a, b: a @ b.T
