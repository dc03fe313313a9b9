"""Cluster: k-means of the tokens of each head, by matrix products and sums in a fixed order.

Equal input gives equal clusters: seeds are not drawn, ties go to the lower cluster and no sum depends on which thread
came first. Nothing waits for the device, and no distance matrix of all tokens is ever held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.pooling import block_means
from dit_accel.kernels.reorder import take_rows

GOLDEN = (5**0.5 - 1) / 2
RUN = 128  # tokens summed at once
# Products of a token and a centroid held at once, in fp32 2 MB and 128 MB: on a CPU dense attention holds hardly more.
PRODUCTS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 25}
TURNS = 8  # of the power iteration: a rough direction orders as well
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


def cluster_tokens(x: Tensor, centroids: Tensor, iterations: int) -> Clusters:
    """k-means (Lloyd), from given centroids, with the clusters in an order in which neighbours are alike.

    Each iteration gives every token to the nearest centroid (Euclidean; products in x's dtype on CUDA, squares and sums
    in fp32) and makes a cluster's mean its centroid. Means and clusters belong together: there is no assignment after
    the last means. The order is made of the centroids before the last iteration: about sqrt(K) groups of them, found
    by k-means too, and both the groups and the centroids of a group as they lie along the direction in which these
    differ most. On tiny-wan's queries and keys (4352 tokens, 72 and 240 clusters, blocks of 32) equal recall takes
    0.97 to 0.9 times the blocks that an order along one direction takes, on synthetic clusters 0.85 times.

    Args:
        x: `[B, H, S, D]`, any strides.
        centroids: `[B, H, K, D]`, any floating dtype.
        iterations: at least 1.

    Source: k-means as in SVG2, arXiv:2505.18875 (semantic-aware permutation); the order of the clusters is ours.
    """
    for _ in range(iterations - 1):
        centroids = _regroup(x, centroids).means
    return _regroup(x, _alike_side_by_side(centroids))


def split_runs(starts: Tensor, longest: int, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut clusters into runs of at most `longest` tokens; a run never holds tokens of two clusters.

    Args:
        starts: int32 `[B, H, K + 1]`, from 0 to `n_tokens`.

    Returns:
        offsets of the runs, int32 `[B, H, R + 1]`; the cluster each is of, int64 `[B, H, R]`; the first run of each
        cluster, int32 `[B, H, K + 1]`. R is `n_tokens // longest + K`, which is enough for any clusters; those not
        needed are empty, stand at the end and are the last cluster's.
    """
    n_clusters = starts.shape[2] - 1
    n_runs = n_tokens // longest + n_clusters
    counts = (starts.diff(dim=-1) + (longest - 1)) // longest
    first = torch.nn.functional.pad(counts.cumsum(-1, dtype=torch.int32), (1, 0))
    first[..., -1] = n_runs
    run = torch.arange(n_runs + 1, device=starts.device, dtype=torch.int32)
    run = run.expand(*starts.shape[:2], -1).contiguous()
    owner = torch.searchsorted(first[..., 1:].contiguous(), run, right=True).clamp_max(n_clusters - 1)
    offsets = starts.gather(2, owner) + (run - first.gather(2, owner)) * longest
    return offsets.clamp_max(n_tokens), owner[..., :-1], first


def _regroup(x: Tensor, centroids: Tensor) -> Clusters:
    """One iteration: nearest centroids, then the means of what they were given."""
    n_tokens, n_clusters = x.shape[2], centroids.shape[2]
    labels, order = _nearest(x, centroids).sort(dim=-1, stable=True)
    order = order.to(torch.int32)
    edges = torch.arange(n_clusters + 1, device=x.device, dtype=torch.int32)
    edges = edges.expand(*labels.shape[:2], -1).contiguous()
    starts = torch.searchsorted(labels, edges, out_int32=True)
    # two steps of sums, runs and then clusters: a cluster may hold any number of tokens, a kernel sums bounded blocks
    offsets, _, first = split_runs(starts, RUN, n_tokens)
    sums = block_means(take_rows(x, order).transpose(1, 2), offsets, RUN) * offsets.diff(dim=-1)[..., None]
    runs = first.diff(dim=-1)
    sums = block_means(sums.transpose(1, 2), first, sums.shape[2]) * runs[..., None]
    sizes = starts.diff(dim=-1)[..., None]
    return Clusters(torch.where(sizes > 0, sums / sizes.clamp_min(1), centroids.to(sums)), starts, order)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The cluster of each token, int32 `[B, H, S]`; of two at equal distance the lower."""
    # the nearest has the largest x c - c c / 2. On a CPU low-precision products are no faster, only coarser.
    dtype = x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32
    centroids = centroids.to(dtype)
    full = centroids.to(torch.promote_types(dtype, torch.float32))
    bias = full.square().sum(-1)[:, :, None] / -2  # of the centroids as the products see them
    columns = centroids.transpose(2, 3)
    limit = PRODUCTS_AT_ONCE.get(x.device.type, min(PRODUCTS_AT_ONCE.values()))
    rows = max(1, limit // bias.numel())
    parts = [(part.to(dtype) @ columns + bias).argmax(-1) for part in x.split(rows, dim=2)]
    return torch.cat(parts, dim=2).to(torch.int32)


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
    for _ in range(TURNS):
        direction = torch.nn.functional.normalize(apart.transpose(2, 3) @ (apart @ direction), dim=2)
    ranks = (apart @ direction).argsort(dim=2, stable=True)
    return take_rows(centroids, ranks[..., 0].to(torch.int32))
