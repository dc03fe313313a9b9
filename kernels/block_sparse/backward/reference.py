"""The backward of block-sparse attention in plain torch, one query block at a time.

    s = scale * q k^T;  p = exp(s - lse)                 of the keys that the query block reads
    delta = rowsum(dout * out) - dlse
    ds = p * (dout v^T - delta)
    dq = scale * ds k;  dk = scale * ds^T q;  dv = p^T dout

`out` moves with every score by p (v - out), `lse` by p: hence the one `delta` for both. Source: FlashAttention-2,
arXiv:2307.08691, algorithm 2, and the gradient of a logarithm of a sum of exponentials.

Products are taken in the type of the inputs (float64 for exact gradients, bfloat16 for the error that type costs
anyone) and summed over blocks in float32, or float64 for float64 inputs. Memory grows with N, not N^2.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan


def differentiate(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        grad_out: `[B, H, Sq, D]`, of the output.
        grad_lse: `[B, H, Sq]`, of the lse. Both are ignored where a row reads nothing.
        q, k, v: what the forward was given, `[B, H, S, D]`, any strides.
        out, lse: what it gave.
        plan: which key blocks each query block reads.
        scale: factor of the scores.

    Returns:
        `dq`, `dk`, `dv`, shaped and typed like q, k and v.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq = torch.zeros_like(q)
    dk, dv = (
        torch.zeros(k.shape, dtype=dtype, device=k.device),
        torch.zeros(v.shape, dtype=dtype, device=v.device),
    )
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1) - grad_lse.to(dtype)
    lead = (*q.shape[:2], -1)
    q_starts, k_starts, counts = (t.expand(lead) for t in (plan.q_starts, plan.k_starts, plan.counts))
    indices = plan.indices.expand(*lead, -1)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = [torch.arange(*ends, device=q.device) for ends in pairwise(k_starts[b, h].tolist())]
            for i, (first, end) in enumerate(pairwise(q_starts[b, h].tolist())):
                listed = indices[b, h, i, : int(counts[b, h, i])].tolist()
                read = torch.cat([keys[j] for j in listed]) if listed else keys[0][:0]
                if first == end or len(read) == 0:
                    continue
                own = slice(first, end)
                b_q, b_do, b_k, b_v = q[b, h, own], grad_out[b, h, own], k[b, h, read], v[b, h, read]
                weights = ((b_q @ b_k.T * scale).to(dtype) - lse[b, h, own, None]).exp()
                pull = (b_do @ b_v.T).to(dtype) - delta[b, h, own, None]
                scores = (weights * pull).to(q.dtype)
                dq[b, h, own] = scores @ b_k * scale
                dk[b, h].index_add_(0, read, (scores.T @ b_q).to(dtype) * scale)
                dv[b, h].index_add_(0, read, (weights.to(q.dtype).T @ b_do).to(dtype))
    return dq, dk.to(k.dtype), dv.to(v.dtype)
