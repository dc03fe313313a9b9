"""The k-means beneath svg2, against loops over tokens."""

import itertools

import pytest
import torch
from by_token import labels_of, randn

from dit_accel.methods.parts.cluster import cluster_tokens, seed_centroids, spread_tokens


def by_loops(x, centroids, iterations):
    """k-means of one head: the cluster of each token and the means."""
    for _ in range(iterations):
        labels = [
            min(range(len(centroids)), key=lambda c: (float((t - centroids[c]).square().sum()), c)) for t in x
        ]
        means = []
        for c, old in enumerate(centroids):
            own = [t for t, label in zip(x, labels, strict=True) if label == c]
            means.append(sum(own) / len(own) if own else old)
        centroids = means
    return labels, torch.stack(means)


@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("strided", [False, True])
def test_clusters_are_those_of_a_loop(iterations, strided):
    x = randn(2, 40, 2, 6, dtype=torch.float64).transpose(1, 2)
    x = x if strided else x.contiguous()
    seeds = seed_centroids(x, 7)
    found = cluster_tokens(x, seeds, iterations)
    labels = labels_of(found)
    for b, h in itertools.product(range(2), range(2)):
        own, means = by_loops(x[b, h], seeds[b, h], iterations)
        # clusters stand in another order: each token's mean tells which is which
        torch.testing.assert_close(found.means[b, h][labels[b, h]], means[own])
        assert found.starts[b, h, 0] == 0 and found.starts[b, h, -1] == 40
        inside = found.order[b, h].long()
        same = labels[b, h][inside[1:]] == labels[b, h][inside[:-1]]
        assert (inside.diff()[same] > 0).all(), "tokens of a cluster keep their order"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_tokens_have_full_precision_means(dtype):
    x = (randn(1, 2, 300, 8) + 3).to(dtype)
    found = cluster_tokens(x, seed_centroids(x, 9), 3)
    assert found.means.dtype == torch.float32
    labels = labels_of(found)
    for h in range(2):
        for c in labels[0, h].unique().tolist():
            true = x[0, h][labels[0, h] == c].double().mean(0)
            torch.testing.assert_close(found.means[0, h, c].double(), true, rtol=1e-5, atol=1e-5)


def test_a_cluster_without_tokens_keeps_its_centroid():
    x = randn(1, 2, 60, 4)
    far = torch.full((1, 2, 3, 4), 100.0) + torch.arange(3.0)[:, None]
    found = cluster_tokens(x, torch.cat([seed_centroids(x, 5), far], dim=2), 3)
    empty = found.starts.diff(dim=-1) == 0
    assert empty.sum() == 6 and found.means.isfinite().all()
    torch.testing.assert_close(found.means[empty].view(2, 3, 4).sort(dim=1).values, far[0])


def test_of_equal_centroids_the_lower_takes_all():
    x = randn(1, 1, 30, 4)
    found = cluster_tokens(x, torch.zeros(1, 1, 4, 4), 1)
    assert found.starts.tolist() == [[[0, 30, 30, 30, 30]]] and found.order.tolist() == [[list(range(30))]]


def test_clusters_are_the_same_again_and_in_other_company():
    x = randn(2, 3, 200, 8)
    found, again = (cluster_tokens(x, seed_centroids(x, 12), 4) for _ in range(2))
    alone = cluster_tokens(x[1:, 2:], seed_centroids(x[1:, 2:], 12), 4)
    assert torch.equal(found.means, again.means) and torch.equal(found.order, again.order)
    assert torch.equal(alone.order[0, 0], found.order[1, 2])


def test_neighbouring_clusters_are_alike():
    """Points along a line come out in its order, from one end or the other."""
    place = torch.randperm(90, generator=torch.Generator().manual_seed(0)).float()
    x = (place[:, None] * torch.tensor([0.6, -0.8, 0.1]) + randn(90, 3) * 0.01)[None, None]
    found = cluster_tokens(x, seed_centroids(x, 30), 5)
    along = found.means[0, 0, :, 0].diff()
    assert (along > 0).all() or (along < 0).all()


def test_clusters_may_keep_their_order():
    x = randn(1, 2, 200, 8)
    centroids = seed_centroids(x, 12)
    kept, moved = (cluster_tokens(x, centroids, 3, rearrange=on) for on in (False, True))
    labels = labels_of(kept)
    apart = torch.cdist(x, centroids)
    one = cluster_tokens(x, centroids, 1, rearrange=False)
    assert torch.equal(labels_of(one), apart.argmin(-1))
    # the same clusters, each where its centroid stood
    torch.testing.assert_close(
        kept.means.gather(2, labels[..., None].expand(-1, -1, -1, 8)),
        moved.means.gather(2, labels_of(moved)[..., None].expand(-1, -1, -1, 8)),
    )


def test_tokens_are_spread_over_runs_and_columns():
    tokens = spread_tokens(32 * 50, 50)  # a run for each row of 32 columns
    assert torch.equal(tokens // 32, torch.arange(50))
    assert (tokens % 32).unique().numel() > 25
    assert spread_tokens(5, 5).tolist() == list(range(5)) and spread_tokens(1, 1).tolist() == [0]
    assert spread_tokens(3, 8).max() == 2
