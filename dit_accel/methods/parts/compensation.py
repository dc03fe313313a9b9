"""Compensation: how much of what is not read comes back as mean values of blocks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.kernels import pooling
from dit_accel.layout import TokenLayout
from dit_accel.plan import BlockPlan


def with_compensation(
    plan: BlockPlan,
    kind: str,
    mass: str,
    logits: Tensor,
    query: Tensor,
    key: Tensor,
    query_means: Tensor,
    key_means: Tensor,
    layout: TokenLayout,
) -> BlockPlan:
    """The plan, with the means of key blocks that it does not read standing in for them.

    Args:
        plan: of the layout's blocks.
        kind: "none"; "all", every block that is not read (VSA's coarse branch, arXiv:2505.13389, weighed by predicted
            mass instead of a learned gate); or "gain", those that `worth_pooling` names (Rectified SpaAttn).
        mass: of the means and of all else. "predicted": what the logits of whole blocks say (Rectified SpaAttn);
            "measured": what each row's own scores say, and what reading finds (`kernels.coarse`).
        logits: fp32 `[B, H, N, N]`, of `attention_logits`.
        query, key: `[B, S, H, D]`.
        query_means, key_means: fp32 `[B, H, N, D]`.
    """
    if kind == "none":
        return plan
    stands_in = ~plan.to_mask()
    if kind == "gain":
        stands_in &= worth_pooling(query, key, query_means, key_means, layout)
    if mass == "measured":
        return with_means(plan, stands_in, logits.shape[:2])
    coarse = logits.masked_fill(~stands_in, -torch.inf)
    return replace(plan, coarse=coarse, rest=logits.masked_fill(stands_in, -torch.inf).logsumexp(-1))


def with_means(plan: BlockPlan, stands_in: Tensor, lead: tuple[int, int]) -> BlockPlan:
    """The plan, with the means of these key blocks standing in for them, each as so many tokens as it has.

    What they weigh is told by each row's own scores with them, beside what reading finds (`kernels.coarse`).

    Args:
        stands_in: bool `[B|1, H|1, Nq, Nk]`.
        lead: batch rows and heads of the queries.
    """
    sizes = plan.k_starts.diff(dim=-1).float().log()[:, :, None]
    return replace(plan, coarse=sizes.masked_fill(~stands_in, -torch.inf).expand(*lead, plan.n_q, plan.n_k))


def worth_pooling(
    query: Tensor, key: Tensor, query_means: Tensor, key_means: Tensor, layout: TokenLayout
) -> Tensor:
    """Pairs of blocks whose means say more about their scores than the means hide, bool `[B, H, N, N]`.

    Gain is `|q k|` of the means; error `|dq k| + |q dk|`, where dq and dk average how far tokens are from the mean,
    number by number, without a sign. Both are of the plain product, not of probabilities. Source: GAPR of Rectified
    SpaAttn, arXiv:2511.19835.
    """
    starts = layout.starts.to(query.device)
    query_spread = pooling.block_deviations(query, starts, layout.max_block, query_means)
    key_spread = pooling.block_deviations(key, starts, layout.max_block, key_means)
    across = key_means.transpose(-1, -2)
    error = (query_spread @ across).abs() + (query_means @ key_spread.transpose(-1, -2)).abs()
    return (query_means @ across).abs() > error
