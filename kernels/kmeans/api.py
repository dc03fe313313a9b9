"""The front door of k-means: validate, choose an implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.choice import Choice

_CHOICE = Choice("nearest_centroids, sort_by_label, cluster_means and overlaps", __package__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def nearest_centroids(x: Tensor, centroids: Tensor, *, impl: str = "auto") -> Tensor:
    """The nearest centroid of each token, Euclidean; of several at equal distance the lowest.

    It is the one of largest `x c - c c / 2`. Products are of x's dtype and summed in fp32 (on a CPU both are fp32),
    `c c / 2` is fp32 and of the centroids as the products see them.

    Args:
        x: `[B, H, S, D]`, float32, float16, bfloat16 or float64, any strides.
        centroids: `[B, H, K, D]`, any of these types, any strides, on x's device; rounded to x's type.
        impl: "reference", "triton", or "auto": "triton" on CUDA where it can run, else "reference". A named one runs
            or raises.

    Returns:
        int32 `[B, H, S]`, 0 to K - 1; for a token that holds NaN any of these.

    Raises:
        UsageError: shapes, types or devices do not fit together.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    _check_tokens(x)
    _check_centroids("centroids", centroids, x)
    if torch.compiler.is_compiling():
        from .op import nearest_centroids as nearest
    else:
        nearest = run_nearest
    return nearest(x, centroids, impl)


def sort_by_label(labels: Tensor, n_clusters: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The tokens cluster by cluster, within one as they came.

    Args:
        labels: int32 `[B, H, S]`, each 0 to `n_clusters` - 1. The numbers are not looked at beforehand: a wrong one
            writes to foreign memory on a GPU.
        impl: as in `nearest_centroids`.

    Returns:
        order, int32 `[B, H, S]`: the token at each place; starts, int32 `[B, H, n_clusters + 1]`: the place where each
        cluster begins, and S.

    Raises:
        UsageError, UnknownNameError, KernelUnavailable: as `nearest_centroids`.
    """
    if labels.dim() != 3 or labels.dtype != torch.int32:
        raise UsageError(f"labels must be int32 [B, H, S], got {labels.dtype} {tuple(labels.shape)}.")
    if n_clusters < 1:
        raise UsageError(f"n_clusters={n_clusters} is not possible: labels are of at least one cluster.")
    if torch.compiler.is_compiling():
        from .op import sort_by_label as sort
    else:
        sort = run_sort
    return sort(labels, n_clusters, impl)


def cluster_means(
    x: Tensor, order: Tensor, starts: Tensor, previous: Tensor, *, impl: str = "auto"
) -> Tensor:
    """The mean of each cluster's tokens, in fp32 also for low-precision input; one without tokens keeps its centroid.

    Sums run in a fixed order without atomics, so equal input gives equal means. However unequal the clusters are, no
    program sums more than 128 tokens, or more than one sum of 128 tokens for each run of them.

    Args:
        x: as in `nearest_centroids`.
        order: int32 `[B, H, S]`, contiguous as is `starts`, int32 `[B, H, K + 1]`; both as of `sort_by_label`.
        previous: `[B, H, K, D]`, the centroids of clusters without tokens; any strides and any of x's types.
        impl: as in `nearest_centroids`.

    Returns:
        `[B, H, K, D]`, float32 (float64 for float64 x).

    Raises:
        UsageError, UnknownNameError, KernelUnavailable: as `nearest_centroids`.
    """
    _check_tokens(x)
    _check_centroids("previous", previous, x)
    for name, given, last in (("order", order, x.shape[2]), ("starts", starts, previous.shape[2] + 1)):
        wanted = (*x.shape[:2], last)
        if given.shape != wanted or given.dtype != torch.int32 or given.device != x.device:
            raise UsageError(
                f"{name} must be int32 {wanted} on {x.device}, got {given.dtype} {tuple(given.shape)} on "
                f"{given.device}."
            )
    if torch.compiler.is_compiling():
        from .op import cluster_means as average
    else:
        average = run_means
    return average(x, order, starts, previous, impl)


def overlaps(starts: Tensor, runs: Tensor, *, impl: str = "auto") -> Tensor:
    """The share of each cluster's tokens that lies in each run, where both are cut from the same places.

    Args:
        starts: int32 `[B, H, K + 1]`, as of `sort_by_label`.
        runs: int32 `[N + 1]`, contiguous, ascending: where each run begins, and the last one's end.
        impl: as in `nearest_centroids`.

    Returns:
        fp32 `[B, H, K, N]`, 0 for a cluster without tokens.

    Raises:
        UsageError, UnknownNameError, KernelUnavailable: as `nearest_centroids`.
    """
    if starts.dim() != 3 or starts.dtype != torch.int32 or starts.shape[2] < 2:
        raise UsageError(f"starts must be int32 [B, H, K + 1], got {starts.dtype} {tuple(starts.shape)}.")
    if runs.dim() != 1 or runs.dtype != torch.int32 or runs.device != starts.device or len(runs) < 2:
        raise UsageError(
            f"runs must be int32 [N + 1] on {starts.device}, got {runs.dtype} {tuple(runs.shape)} on {runs.device}."
        )
    if torch.compiler.is_compiling():
        from .op import overlaps as overlap
    else:
        overlap = run_overlaps
    return overlap(starts, runs, impl)


def run_nearest(x: Tensor, centroids: Tensor, impl: str) -> Tensor:
    """`nearest_centroids` on validated arguments."""
    match choose(x, centroids.shape[2], impl):
        case "reference":
            from .reference import nearest_centroids as nearest
        case "triton":
            from .triton import nearest_centroids as nearest
    with torch.no_grad():
        return nearest(x, centroids)


def run_sort(labels: Tensor, n_clusters: int, impl: str) -> tuple[Tensor, Tensor]:
    """`sort_by_label` on validated arguments."""
    match choose(labels, n_clusters, impl):
        case "reference":
            from .reference import sort_by_label as sort
        case "triton":
            from .triton import sort_by_label as sort
    return sort(labels, n_clusters)


def run_means(x: Tensor, order: Tensor, starts: Tensor, previous: Tensor, impl: str) -> Tensor:
    """`cluster_means` on validated arguments."""
    match choose(x, previous.shape[2], impl):
        case "reference":
            from .reference import cluster_means as average
        case "triton":
            from .triton import cluster_means as average
    with torch.no_grad():
        return average(x, order, starts, previous)


def run_overlaps(starts: Tensor, runs: Tensor, impl: str) -> Tensor:
    """`overlaps` on validated arguments."""
    match choose(starts, starts.shape[2] - 1, impl):
        case "reference":
            from .reference import overlaps as overlap
        case "triton":
            from .triton import overlaps as overlap
    return overlap(starts, runs)


def choose(x: Tensor, n_clusters: int, impl: str = "auto") -> str:
    """The implementation that will run for these tokens, labels or offsets; raises as `nearest_centroids` does."""
    fast = x.device.type == "cuda" and why_not("triton", x, n_clusters) is None
    return _CHOICE.choose(impl, fast, x, n_clusters)


def why_not(impl: str, x: Tensor, n_clusters: int) -> str | None:
    """Why `impl` cannot run for these tokens, labels or offsets, or None if it can."""
    return _CHOICE.why_not(impl, x, n_clusters)


def _check_tokens(x: Tensor) -> None:
    if x.dim() != 4 or x.dtype not in _DTYPES or not x.shape[2]:
        raise UsageError(
            f"x must be [B, H, S, D] in float32, float16, bfloat16 or float64, S at least 1, got {x.dtype} "
            f"{tuple(x.shape)}."
        )


def _check_centroids(name: str, centroids: Tensor, x: Tensor) -> None:
    fits = centroids.dim() == 4 and centroids.shape[:2] == x.shape[:2] and centroids.shape[3] == x.shape[3]
    if not fits or not centroids.shape[2] or centroids.dtype not in _DTYPES or centroids.device != x.device:
        raise UsageError(
            f"{name} must be floating [B, H, K, D], K at least 1, on {x.device} for x {tuple(x.shape)}, got "
            f"{centroids.dtype} {tuple(centroids.shape)} on {centroids.device}."
        )
