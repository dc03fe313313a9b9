"""The steps of k-means in plain torch, in float32, or float64 for float64 input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Products of a token and a centroid held at once, in fp32 2 MB and 128 MB: on a CPU dense attention holds hardly more.
PRODUCTS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 25}


def nearest_centroids(x: Tensor, centroids: Tensor) -> Tensor:
    """Arguments and result as in `api.nearest_centroids`."""
    # On a CPU low-precision products are no faster, only coarser.
    dtype = x.dtype if x.is_cuda or x.dtype == torch.float64 else torch.float32
    centroids = centroids.to(x.dtype).to(dtype)
    full = centroids.to(torch.promote_types(dtype, torch.float32))
    bias = full.square().sum(-1)[:, :, None] / -2
    columns = centroids.transpose(2, 3)
    limit = PRODUCTS_AT_ONCE.get(x.device.type, min(PRODUCTS_AT_ONCE.values()))
    rows = max(1, limit // bias.numel())
    parts = [(part.to(dtype) @ columns + bias).argmax(-1) for part in x.split(rows, dim=2)]
    return torch.cat(parts, dim=2).to(torch.int32)


def sort_by_label(labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `api.sort_by_label`."""
    labels, order = labels.sort(dim=-1, stable=True)
    edges = torch.arange(n_clusters + 1, device=labels.device, dtype=torch.int32)
    edges = edges.expand(*labels.shape[:2], -1).contiguous()
    return order.to(torch.int32), torch.searchsorted(labels, edges, out_int32=True)


def cluster_means(x: Tensor, order: Tensor, starts: Tensor, previous: Tensor) -> Tensor:
    """Arguments and result as in `api.cluster_means`. Sums are float64, one head at a time: a cluster may be long."""
    full = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(previous.shape, dtype=full, device=x.device)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            means = F.embedding_bag(order[b, h], x[b, h].double(), starts[b, h, :-1], mode="mean")
            empty = starts[b, h].diff()[:, None] == 0
            out[b, h] = torch.where(empty, previous[b, h].double(), means)
    return out


def overlaps(starts: Tensor, runs: Tensor) -> Tensor:
    """Arguments and result as in `api.overlaps`."""
    first = starts[..., :-1, None].maximum(runs[:-1])
    after = starts[..., 1:, None].minimum(runs[1:])
    return after.sub_(first).clamp_min_(0) / starts.diff(dim=-1)[..., None].clamp_min(1)
