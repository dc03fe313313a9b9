"""The steps of k-means against float64, a stable sort and loops over tokens."""

from __future__ import annotations

import pytest
import torch

import dit_accel.kernels.kmeans.op  # noqa: F401
from dit_accel.errors import KernelUnavailable, UnknownNameError, UsageError
from dit_accel.kernels.kmeans import cluster_means, nearest_centroids, overlaps, sort_by_label

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tokens and clusters: below, at and beyond the blocks of the kernels
SIZES = [(1, 1), (77, 3), (256, 64), (401, 65), (130, 200)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def distances(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Squared, float64, `[B, H, S, K]`, of the centroids in x's type."""
    x, centroids = x.cpu().double(), centroids.to(x.dtype).cpu().double()
    return (x[:, :, :, None] - centroids[:, :, None]).square().sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 64, 72, 200])
@pytest.mark.parametrize(("tokens", "clusters"), SIZES)
def test_labels_name_the_nearest(impl: str, device: str, tokens, clusters, dim: int, dtype: torch.dtype):
    # in the tokens' type: the interpreter cuts bfloat16 off where a GPU rounds
    x, centroids = (randn(1, 2, n, dim, seed=n).to(device, dtype) for n in (tokens, clusters))
    labels = nearest_centroids(x, centroids, impl=impl)
    assert labels.dtype == torch.int32 and labels.shape == (1, 2, tokens)
    apart = distances(x, centroids)
    taken = apart.gather(3, labels.cpu().long()[..., None])[..., 0]
    nearest = apart.min(-1).values
    # sums of fp32: what it took may be farther by rounding of a length squared only
    torch.testing.assert_close(taken, nearest, rtol=0, atol=4e-6 * float(apart.max()))
    assert (labels.cpu() == apart.argmin(-1)).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_centroids_are_taken_as_the_products_see_them(impl: str, device: str, dtype: torch.dtype):
    x, centroids = randn(1, 2, 90, 16).to(device, dtype), randn(1, 2, 20, 16, seed=1).to(device) * 30
    labels = nearest_centroids(x, centroids, impl=impl)
    assert torch.equal(labels, nearest_centroids(x, centroids.to(dtype), impl=impl))
    assert torch.equal(labels.cpu().long(), distances(x, centroids).argmin(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_distances_the_lowest_wins(impl: str, device: str, dtype: torch.dtype):
    """Whole numbers, whose products and sums are exact."""
    generator = torch.Generator().manual_seed(0)
    x, centroids = (torch.randint(-1, 2, (2, 3, n, 4), generator=generator) for n in (150, 170))
    x, centroids = x.to(device, dtype), centroids.to(device, dtype)
    labels = nearest_centroids(x, centroids, impl=impl).cpu().long()
    assert torch.equal(labels, distances(x, centroids).argmin(-1))


def test_float64_stays_float64():
    x, centroids = randn(1, 2, 90, 5).double(), randn(1, 2, 7, 5, seed=1).double()
    labels, _, _, means = steps(x, centroids)
    assert means.dtype == torch.float64 and torch.equal(labels.long(), distances(x, centroids).argmin(-1))
    for h in range(2):
        for c in labels[0, h].unique().tolist():
            torch.testing.assert_close(means[0, h, c], x[0, h][labels[0, h] == c].mean(0), rtol=0, atol=1e-14)


def test_any_strides(impl: str, device: str):
    fused = randn(2, 70, 3, 2, 65).to(device)  # tokens before heads, as models have them
    x, centroids = fused[:, :, :, 0, 1:].transpose(1, 2), fused[:, :9, :, 1, 1:].transpose(1, 2)
    labels = nearest_centroids(x, centroids, impl=impl)
    assert torch.equal(labels, nearest_centroids(x.contiguous(), centroids.contiguous(), impl=impl))
    order, starts = sort_by_label(labels, 9, impl=impl)
    means = cluster_means(x, order, starts, centroids, impl=impl)
    assert torch.equal(means, cluster_means(x.contiguous(), order, starts, centroids.contiguous(), impl=impl))
    spread = torch.zeros(2, 3, 140, dtype=torch.int32, device=device)[..., ::2].copy_(labels)
    assert torch.equal(sort_by_label(spread, 9, impl=impl)[0], order)


@pytest.mark.parametrize("kind", ["even", "one", "unequal"])
@pytest.mark.parametrize(("tokens", "clusters"), [(1, 1), (256, 15), (256, 16), (700, 40), (700, 300)])
def test_the_sort_is_stable(impl: str, device: str, tokens: int, clusters: int, kind: str):
    labels = random_labels(tokens, clusters, kind).to(device)
    order, starts = sort_by_label(labels, clusters, impl=impl)
    assert order.dtype == starts.dtype == torch.int32 and starts.shape == (1, 2, clusters + 1)
    assert torch.equal(order.cpu().long(), labels.cpu().argsort(dim=-1, stable=True))
    for row, found in zip(labels.flatten(0, 1).cpu(), starts.flatten(0, 1).cpu(), strict=True):
        assert found[0] == 0 and torch.equal(found.diff().long(), torch.bincount(row, minlength=clusters))


def test_many_chunks_are_sorted(impl: str, device: str):
    """More chunks than one step of the sums over them takes."""
    labels = random_labels(256 * 65 + 5, 33, "unequal").to(device)
    order, starts = sort_by_label(labels, 33, impl=impl)
    assert torch.equal(order.cpu().long(), labels.cpu().argsort(dim=-1, stable=True))
    assert (starts[..., -1] == 256 * 65 + 5).all()


def random_labels(tokens: int, clusters: int, kind: str) -> torch.Tensor:
    """int32 `[1, 2, S]`; "one": nearly all are of one cluster."""
    drawn = torch.rand(1, 2, tokens, generator=torch.Generator().manual_seed(tokens + clusters))
    if kind == "one":
        drawn = torch.where(drawn < 0.02, drawn * 50, 0.6)
    elif kind == "unequal":
        drawn = drawn**6
    return (drawn * clusters).int()


@pytest.mark.parametrize("kind", ["even", "one", "unequal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [12, 64])
@pytest.mark.parametrize(("tokens", "clusters"), [(1, 1), (129, 20), (700, 5)])
def test_means_equal_float64(
    impl: str, device: str, tokens, clusters, dim: int, dtype: torch.dtype, kind: str
):
    labels = random_labels(tokens, clusters, kind)
    x, previous = randn(1, 2, tokens, dim).to(dtype) + 1, randn(1, 2, clusters, dim, seed=2)
    order, starts = sort_by_label(labels, clusters, impl="reference")
    right = previous.double()
    for h in range(2):
        for c in labels[0, h].unique().tolist():
            right[0, h, c] = x[0, h][labels[0, h] == c].double().mean(0)
    there = (t.to(device) for t in (x, order, starts, previous))
    means = cluster_means(*there, impl=impl)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means.cpu().double(), right, rtol=1e-5, atol=2e-6)


def test_one_cluster_may_hold_everything(impl: str, device: str):
    """More runs than one step of the second sum takes, and empty clusters on both sides."""
    tokens = 128 * 34 + 1
    x, previous = randn(1, 1, tokens, 16).to(device), randn(1, 1, 5, 16, seed=1).to(device, torch.bfloat16)
    labels = torch.full((1, 1, tokens), 3, dtype=torch.int32, device=device)
    means = cluster_means(x, *sort_by_label(labels, 5, impl=impl), previous, impl=impl)
    torch.testing.assert_close(
        means[0, 0, 3].cpu().double(), x[0, 0].cpu().double().mean(0), rtol=0, atol=2e-6
    )
    for empty in (0, 1, 2, 4):
        assert torch.equal(means[0, 0, empty], previous[0, 0, empty].float())


@pytest.mark.parametrize(("tokens", "clusters", "run"), [(1, 1, 1), (90, 20, 8), (300, 5, 2), (300, 5, 400)])
def test_overlaps_are_counted_token_by_token(impl: str, device: str, tokens, clusters, run: int):
    labels = random_labels(tokens, clusters, "unequal")
    starts = sort_by_label(labels, clusters, impl="reference")[1]
    runs = torch.tensor([*range(0, tokens, run), tokens], dtype=torch.int32)
    found = overlaps(starts.to(device), runs.to(device), impl=impl).cpu()
    count = torch.zeros(1, 2, clusters, len(runs) - 1)
    for h in range(2):
        for place, label in enumerate(labels[0, h].sort().values.tolist()):
            count[0, h, label, place // run] += 1
    assert found.dtype == torch.float32
    assert torch.equal(found, count / count.sum(3, keepdim=True).clamp_min(1))


def test_another_rows_nan_stays_there_and_labels_stay_in_range(impl: str, device: str):
    x, centroids = randn(2, 2, 90, 16).to(device), randn(2, 2, 17, 16, seed=1).to(device)
    clean = steps(x, centroids, impl)
    x[1], x[0, 1, 5] = torch.nan, torch.nan
    labels, order, _, means = steps(x, centroids, impl)
    assert torch.equal(means[0, 0], clean[3][0, 0]) and torch.equal(order[0, 0], clean[1][0, 0])
    assert labels.min() >= 0 and labels.max() < 17


def test_equal_input_gives_equal_bits(impl: str, device: str):
    x, centroids = randn(1, 2, 500, 64).to(device, torch.bfloat16), randn(1, 2, 30, 64, seed=1).to(device)
    for one, two in zip(steps(x, centroids, impl), steps(x, centroids, impl), strict=True):
        assert torch.equal(one, two)


def steps(x: torch.Tensor, centroids: torch.Tensor, impl: str = "auto") -> tuple[torch.Tensor, ...]:
    """One iteration of k-means."""
    labels = nearest_centroids(x, centroids, impl=impl)
    order, starts = sort_by_label(labels, centroids.shape[2], impl=impl)
    return labels, order, starts, cluster_means(x, order, starts, centroids, impl=impl)


def test_they_are_nodes_of_one_graph():
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager", dynamic=False)
    x, centroids = randn(2, 3, 20, 8), randn(2, 3, 5, 8)
    for found, expected in zip(compiled(x, centroids), steps(x, centroids), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_operators_are_sound(dtype: torch.dtype):
    x, centroids = randn(2, 20, 3, 8).to(dtype).transpose(1, 2), randn(2, 3, 5, 8).to(dtype)
    labels, order, starts, _ = steps(x, centroids)
    ops = torch.ops.dit_accel
    for op, arguments in (
        (ops.nearest_centroids, (x, centroids)),
        (ops.sort_by_label, (labels, 5)),
        (ops.cluster_means, (x, order, starts, centroids)),
        (ops.overlaps, (starts, torch.tensor([0, 8, 16, 20], dtype=torch.int32))),
    ):
        torch.library.opcheck(op, (*arguments, "reference"), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("dim", "clusters"), [(300, 3), (8, 5000)])
def test_what_is_too_large_for_the_kernel_runs_in_plain_torch(device: str, dim: int, clusters: int):
    x, centroids = randn(1, 1, 20, dim).to(device), randn(1, 1, clusters, dim, seed=1).to(device)
    assert torch.equal(nearest_centroids(x, centroids).cpu().long(), distances(x, centroids).argmin(-1))
    with pytest.raises(KernelUnavailable, match="300|5000|CUDA|triton"):
        nearest_centroids(x, centroids, impl="triton")


def test_what_does_not_fit_is_refused():
    x, centroids = randn(2, 3, 9, 4), randn(2, 3, 5, 4)
    labels, order, starts, _ = steps(x, centroids)
    with pytest.raises(UsageError, match=r"\[B, H, S, D\]"):
        nearest_centroids(x[0], centroids)
    with pytest.raises(UsageError, match="float32, float16"):
        nearest_centroids(x.int(), centroids)
    with pytest.raises(UsageError, match=r"\[B, H, K, D\]"):
        nearest_centroids(x, centroids[:, :2])
    with pytest.raises(UsageError, match="int32"):
        sort_by_label(labels.long(), 5)
    with pytest.raises(UsageError, match="n_clusters=0"):
        sort_by_label(labels, 0)
    with pytest.raises(UsageError, match="order must be int32"):
        cluster_means(x, order[..., 1:], starts, centroids)
    with pytest.raises(UsageError, match="starts must be int32"):
        cluster_means(x, order, starts[..., 1:], centroids)
    with pytest.raises(UsageError, match="previous must be"):
        cluster_means(x, order, starts, centroids[..., 1:])
    runs = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(UsageError, match="starts must be int32"):
        overlaps(starts[0], runs)
    with pytest.raises(UsageError, match="runs must be int32"):
        overlaps(starts, runs.long())
    with pytest.raises(UnknownNameError, match="triton"):
        nearest_centroids(x, centroids, impl="tritn")
