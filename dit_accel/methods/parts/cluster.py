"""Cluster: k-means of the tokens of each head, by matrix products and sums in a fixed order.

Equal input gives equal clusters: seeds are not drawn, ties go to the lower cluster and no sum depends on which thread
came first. Nothing waits for the device, and no distance matrix of all tokens is ever held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.kmeans import cluster_means, nearest_centroids, sort_by_label
from dit_accel.kernels.reorder import take_rows

GOLDEN = (5**0.5 - 1) / 2
DOUBLINGS = 3  # of the power iteration, so eight turns: a rough direction orders as well
GROUPING = 3  # iterations that group centroids; with five 1 % fewer blocks are read


@dataclass(frozen=True, eq=False)
class Clusters:
    """A partition of the tokens of every head into K clusters, some of them perhaps empty."""

    means: Tensor  # fp32 (fp64 for fp64 tokens) [B, H, K, D]; an empty cluster keeps its centroid
    starts: Tensor  # int32 [B, H, K + 1], where each cluster begins in `order`
    order: Tensor  # int32 [B, H, S], the tokens cluster by cluster, within one as they came


def spread_tokens(n_tokens: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """One token from each of `count` equal runs, ascending; int64 `[count]`.

    Their places within the runs follow the golden ratio: equal distances would meet the same column of every row
    wherever they are a multiple of the grid's width.
    """
    run = torch.arange(count, dtype=torch.float64, device=device)
    places = (run + (run * GOLDEN).frac()) * (n_tokens / count)
    return places.long().clamp_max(n_tokens - 1)


def seed_centroids(x: Tensor, count: int) -> Tensor:
    """Tokens to start from, `[B, H, count, D]` in x's dtype. x: `[B, H, S, D]`, any strides."""
    return x.index_select(2, spread_tokens(x.shape[2], count, x.device))


def cluster_tokens(x: Tensor, centroids: Tensor, iterations: int, *, rearrange: bool = True) -> Clusters:
    """k-means (Lloyd), from given centroids, with the clusters in an order in which neighbours are alike.

    Each iteration gives every token to the nearest centroid (Euclidean; products in x's dtype, squares and sums in
    fp32) and makes a cluster's mean its centroid. Means and clusters belong together: there is no assignment after
    the last means. The order is made of the centroids before the last iteration: about sqrt(K) groups of them, found
    by k-means too, and both the groups and the centroids of a group as they lie along the direction in which these
    differ most. On tiny-wan's queries and keys (4352 tokens, 72 and 240 clusters, blocks of 32) equal recall takes
    0.97 to 0.9 times the blocks that an order along one direction takes, on synthetic clusters 0.85 times.

    Args:
        x: `[B, H, S, D]`, any strides.
        centroids: `[B, H, K, D]`, any floating dtype.
        iterations: at least 1.
        rearrange: whether to look for that order; otherwise clusters stand as their centroids were given.

    Source: k-means as in SVG2, arXiv:2505.18875 (semantic-aware permutation); the order of the clusters is ours.
    """
    for _ in range(iterations - 1):
        centroids = _regroup(x, centroids).means
    return _regroup(x, _alike_side_by_side(centroids) if rearrange else centroids)


def _regroup(x: Tensor, centroids: Tensor) -> Clusters:
    """One iteration: nearest centroids, then the means of what they were given."""
    order, starts = sort_by_label(nearest_centroids(x, centroids), centroids.shape[2])
    return Clusters(cluster_means(x, order, starts, centroids), starts, order)


def _alike_side_by_side(centroids: Tensor) -> Tensor:
    """The same centroids, group by group."""
    centroids = _along_one_direction(centroids)
    means = seed_centroids(centroids, math.isqrt(centroids.shape[2]))
    for _ in range(GROUPING - 1):
        means = _regroup(centroids, means).means
    return take_rows(centroids, _regroup(centroids, _along_one_direction(means)).order)


def _along_one_direction(centroids: Tensor) -> Tensor:
    """The same centroids in the order of their projections on the direction in which they differ most."""
    full = centroids.to(torch.promote_types(centroids.dtype, torch.float32))
    apart = full - full.mean(2, keepdim=True)
    # the power iteration begins with the one farthest out, which cannot be at right angles to all
    farthest = apart.square().sum(-1, keepdim=True).argmax(2, keepdim=True)
    direction = apart.gather(2, farthest.expand(-1, -1, -1, apart.shape[3])).transpose(2, 3)  # [B, H, D, 1]
    spread = apart.transpose(2, 3) @ apart
    for _ in range(DOUBLINGS):
        # with a largest entry of 1 its square is at most D
        spread = spread / spread.amax((2, 3), keepdim=True).clamp_min(torch.finfo(spread.dtype).tiny)
        spread = spread @ spread
    ranks = (apart @ (spread @ direction)).argsort(dim=2, stable=True)
    return take_rows(centroids, ranks[..., 0].to(torch.int32))
