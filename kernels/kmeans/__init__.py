"""k-means step by step: `nearest_centroids`, `sort_by_label`, `cluster_means`; and `overlaps` of clusters and runs."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import choose, cluster_means, nearest_centroids, overlaps, sort_by_label, why_not

__all__ = [
    "IMPLEMENTATIONS",
    "choose",
    "cluster_means",
    "nearest_centroids",
    "overlaps",
    "sort_by_label",
    "why_not",
]
