"""The steps of k-means as opaque nodes of torch.compile: `torch.ops.dit_accel.nearest_centroids` and so on."""

from __future__ import annotations

import torch
from torch import Tensor

from .api import run_means, run_nearest, run_overlaps, run_sort


@torch.library.custom_op("dit_accel::nearest_centroids", mutates_args=())
def nearest_centroids(x: Tensor, centroids: Tensor, impl: str) -> Tensor:
    """As `api.nearest_centroids`, without its checks."""
    return run_nearest(x, centroids, impl)


@nearest_centroids.register_fake
def _labels(x, centroids, impl):
    return x.new_empty(x.shape[:3], dtype=torch.int32)


@torch.library.custom_op("dit_accel::sort_by_label", mutates_args=())
def sort_by_label(labels: Tensor, n_clusters: int, impl: str) -> tuple[Tensor, Tensor]:
    """As `api.sort_by_label`, without its checks."""
    return run_sort(labels, n_clusters, impl)


@sort_by_label.register_fake
def _order(labels, n_clusters, impl):
    return labels.new_empty(labels.shape), labels.new_empty(*labels.shape[:2], n_clusters + 1)


@torch.library.custom_op("dit_accel::cluster_means", mutates_args=())
def cluster_means(x: Tensor, order: Tensor, starts: Tensor, previous: Tensor, impl: str) -> Tensor:
    """As `api.cluster_means`, without its checks."""
    return run_means(x, order, starts, previous, impl)


@cluster_means.register_fake
def _means(x, order, starts, previous, impl):
    full = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(previous.shape, dtype=full)


@torch.library.custom_op("dit_accel::overlaps", mutates_args=())
def overlaps(starts: Tensor, runs: Tensor, impl: str) -> Tensor:
    """As `api.overlaps`, without its checks."""
    return run_overlaps(starts, runs, impl)


@overlaps.register_fake
def _shares(starts, runs, impl):
    shape = (*starts.shape[:2], starts.shape[2] - 1, runs.shape[0] - 1)
    return starts.new_empty(shape, dtype=torch.float32)
