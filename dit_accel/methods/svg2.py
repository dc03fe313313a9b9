"""svg2: sort the tokens of each head into clusters, and let each cluster of queries read the keys that suit it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.methods.parts.cluster import Clusters
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call

TOP_P = 0.9  # where no budget is given


@dataclass
class Centroids:
    """What a branch and layer hand on from step to step, `[B, H, K, D]` in the model's dtype.

    They stand in the order that the first call found, in which neighbours are alike.
    """

    query: Tensor | None = None
    key: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """k-means of queries and of keys, and runs of keys by the attention that each cluster of queries should pay.

    Per head, queries and keys are clustered apart, from the centroids of the step before. A query of cluster i and the
    keys of cluster j are taken for their centroids c: keys j together get the share |K_j| exp(c_i c_j / sqrt(D)) of
    i's attention, over its sum. Then the tokens stand cluster by cluster, queries and keys each in an order of their
    own. A block of queries begins with each cluster, and again every `block` tokens in it; keys are cut every `block`
    tokens. Each cluster of queries reads the runs of keys of largest shares, up to and including the one that reaches
    `top_p`.

    The published code's key blocks are clusters too. A GPU computes whole tiles, so clusters of keys that lie beside
    each other and are read together are better read in full tiles, and a run of keys is chosen by its own share.
    Queries are another matter: a tile that holds several clusters would choose for their mean, and what few tokens
    need, a small object, is then left out at every step.

    Text is not clustered: it stands at the end in blocks of its own, is always read and reads everything, and shares
    are among the video's keys.

    Source: SVG2 (Sparse VideoGen2), arXiv:2505.18875. Published: 300 query clusters for Wan at 720p, 200 at 480p, 400
    for HunyuanVideo at 720p, which are all 1.1 times the square root of the tokens; 1000 key clusters; top_p 0.9,
    min_keep 0.1, 50 first iterations and 2 at each step. The published code keeps centroids on the attention class, so
    that both branches of guidance and the next video start from one another's; here each branch has its own and a run
    begins anew.
    """

    arrangement: ClassVar[Arrangement] = Arrangement("raster", 64)

    keep: float | None = None  # share of the video's key blocks to read
    top_p: float | None = None  # read the fewest blocks that should hold this share; 0.9 without a budget
    min_keep: float = 0.1  # with top_p read at least this share of the video's key blocks
    q_clusters: int | None = None  # clusters of queries; None: 1.1 times the square root of the tokens
    k_clusters: int | None = None  # clusters of keys; None: 3.64 times the square root of the tokens
    first_iterations: int = 10  # of k-means at the first call; 50 cover no more of tiny-wan's attention
    iterations: int = 2  # of k-means at later calls, from the centroids of the one before

    def __post_init__(self) -> None:
        for name in ("q_clusters", "k_clusters", "first_iterations", "iterations"):
            value = getattr(self, name)
            optional = name.endswith("clusters")
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                more = ", or none" if optional else ""
                raise UsageError(f"{name}={value!r} is not possible: {name} is a whole number from 1{more}.")
        number = isinstance(self.min_keep, int | float) and not isinstance(self.min_keep, bool)
        if not number or not 0 <= self.min_keep <= 1:
            raise UsageError(f"min_keep={self.min_keep!r} is not possible: min_keep is a share from 0 to 1.")

    def init_state(self, query: Tensor, layout: TokenLayout) -> Centroids:
        """No centroids yet."""
        return Centroids()

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """Cluster, and predict which runs of keys matter to each run of queries.

        Args:
            query: `[B, S, H, D]`, post-RoPE, in the layout's order; as is `key`.
            state: the centroids of the step before, replaced by this step's; None begins anew.

        Returns:
            A plan of its own for every batch row and head, with orders of its own.
        """
        import torch

        from dit_accel.methods.parts.budget import choose_blocks
        from dit_accel.methods.parts.runs import (
            cluster_forced,
            count_runs,
            cut_clusters,
            plan_of_runs,
            run_sizes,
            run_starts,
            with_text,
        )

        before = Centroids() if state is None else state
        root = layout.n_video_tokens**0.5
        videos = (x[:, layout.video_tokens] for x in (query, key))
        queries = self._cluster(next(videos), before.query, self.q_clusters or round(1.1 * root))
        keys = self._cluster(next(videos), before.key, self.k_clusters or round(3.64 * root))
        before.query, before.key = queries.means.to(query.dtype), keys.means.to(key.dtype)

        video, text = count_runs(layout)
        starts = run_starts(layout)[0, 0, : video + 1].to(query.device)
        shares = expected_shares(queries, keys, starts, query.shape[3] ** -0.5).float()
        clusters = shares.shape[2]
        shares = torch.nn.functional.pad(shares, (0, text, 0, 2))  # rows for no token and for text
        scores = shares / run_sizes(layout).to(query.device)
        keep, top_p = self._budget()
        forced = cluster_forced(clusters, layout).to(query.device)
        shares = None if top_p is None else shares
        counts, indices = choose_blocks(scores, forced, keep, top_p, shares, text_blocks=text)
        counts[:, :, clusters] = 0
        q_starts, owner = cut_clusters(queries.starts, layout)
        chosen = counts.gather(2, owner), indices.gather(2, owner[..., None].expand(-1, -1, -1, indices.shape[3]))
        orders = (with_text(one.order, layout) for one in (queries, keys))
        return plan_of_runs(*chosen, layout, *orders, q_starts)

    def _budget(self) -> tuple[float | None, float | None]:
        """`keep` and `top_p` as they hold together."""
        top_p = TOP_P if self.keep is None and self.top_p is None else self.top_p
        if top_p is None:
            return self.keep, None
        # shares that add up to 1 in theory may reach it early, or never
        return (1.0, None) if top_p >= 1 else (max(self.keep or 0.0, self.min_keep), top_p)

    def _cluster(self, x: Tensor, before: Tensor | None, count: int) -> Clusters:
        from dit_accel.methods.parts.cluster import cluster_tokens, seed_centroids

        x = x.transpose(1, 2)
        count = min(count, x.shape[2])
        if before is None or before.shape[2] != count:
            return cluster_tokens(x, seed_centroids(x, count), self.first_iterations)
        # The order that the first call found holds: on tiny-wan, 24 steps and blocks of 32, a new one at every call
        # changes mean recall from 0.8467 to 0.8469, and at the last step from 0.861 to 0.863.
        return cluster_tokens(x, before, self.iterations, rearrange=False)


def expected_shares(queries: Clusters, keys: Clusters, starts: Tensor, scale: float) -> Tensor:
    """Share of each query cluster's attention that each run of keys should take, every token taken for its centroid.

    Args:
        starts: int32 `[N + 1]`, offsets of the runs in the keys' order.
        scale: factor of the logits.

    Returns:
        `[B, H, K, N]` in the means' dtype, rows summing to one.
    """
    import torch

    from dit_accel.kernels.kmeans import overlaps

    flat = [x.flatten(0, 1) for x in (queries.means, keys.means)]
    sizes = keys.starts.diff(dim=-1).flatten(0, 1)[:, None]
    bias = sizes.log().to(flat[1].dtype)  # log 0 leaves empty ones out
    shares = torch.baddbmm(bias, flat[0], flat[1].transpose(1, 2), alpha=scale).softmax(dim=-1)  # of clusters
    of_runs = overlaps(keys.starts, starts).flatten(0, 1).to(shares.dtype)
    return (shares @ of_runs).unflatten(0, queries.means.shape[:2])
