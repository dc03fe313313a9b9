"""Compensation: how much of what is not read comes back as mean values of blocks."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dit_accel.kernels import pooling
from dit_accel.layout import TokenLayout
from dit_accel.plan import BlockPlan

KINDS = ("none", "gain", "all")  # of `compensation`


def with_compensation(
    plan: BlockPlan,
    kind: str,
    shares: Tensor,
    query: Tensor,
    key: Tensor,
    query_means: Tensor,
    key_means: Tensor,
    layout: TokenLayout,
) -> BlockPlan:
    """The plan, with weights for the mean values of key blocks that it does not read.

    A block's weight is the share of attention that it is expected to take; what is read has the rest.

    Args:
        plan: of the layout's blocks.
        kind: "none"; "all", every block that is not read (VSA's coarse branch, arXiv:2505.13389, weighed by predicted
            mass instead of a learned gate); or "gain", those that `worth_pooling` names (Rectified SpaAttn).
        shares: fp32 `[B, H, N, N]`, of `expected_attention`.
        query, key: `[B, S, H, D]`.
        query_means, key_means: fp32 `[B, H, N, D]`.
    """
    if kind == "none":
        return plan
    weights = shares.masked_fill(plan.to_mask(), 0)
    if kind == "gain":
        weights = weights * worth_pooling(query, key, query_means, key_means, layout)
    return replace(plan, coarse=weights)


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
