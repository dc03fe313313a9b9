"""svg1 and svg2, and the k-means beneath svg2, against their formulas token by token."""

import itertools
import math

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.layout import build_layout
from dit_accel.methods import load_method
from dit_accel.methods.parts.budget import blocks_for
from dit_accel.methods.parts.cluster import cluster_tokens, seed_centroids, spread_tokens
from dit_accel.methods.svg2 import expected_shares

GRIDS = [(3, 5, 7), (4, 9, 10), (1, 8, 11), (5, 1, 3)]
CASES = list(itertools.product(GRIDS, [0, 5, 19]))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(layout, heads=2, batch=1, seed=0, dim=8):
    """Queries and keys in clusters of unequal size, so that there is something to choose."""
    centres = randn(12, dim, seed=seed) * 2
    labels = torch.randint(
        0, 12, (2, batch, layout.n_tokens, heads), generator=torch.Generator().manual_seed(seed)
    )
    labels = labels.minimum(labels.flip(2))
    return (centres[labels] + randn(2, batch, layout.n_tokens, heads, dim, seed=seed + 1)).unbind()


def token_mask(plan, block, layout):
    """Which token reads which, bool `[B, H, S, S]`, from the plan's lists and orders."""
    batch, heads = plan.lead
    n = layout.n_tokens
    mask = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    starts = plan.q_starts.view(-1).tolist()
    assert starts == plan.k_starts.view(-1).tolist()
    assert max(b - a for a, b in itertools.pairwise(starts)) <= block
    lead = (batch, heads)
    for b, h in itertools.product(range(batch), range(heads)):
        counts, indices = (x.expand(*lead, *x.shape[2:])[b, h] for x in (plan.counts, plan.indices))
        q_order, k_order = (x.expand(*lead, -1)[b, h].long() for x in (plan.q_order, plan.k_order))
        for i, count in enumerate(counts.tolist()):
            for j in indices[i, :count].tolist():
                rows, columns = q_order[starts[i] : starts[i + 1]], k_order[starts[j] : starts[j + 1]]
                mask[b, h, rows[:, None], columns] = True
    return mask


def assert_well_formed(plan, layout):
    """Orders are permutations that leave the text at the end, text reads and is read, and blocks are as promised."""
    n, video = layout.n_tokens, layout.n_video_tokens
    for order in (plan.q_order, plan.k_order):
        assert order.dtype == torch.int32
        assert torch.equal(order.sort(dim=-1).values.long(), torch.arange(n).expand(order.shape))
        assert torch.equal(order[..., video:].long(), torch.arange(video, n).expand(*order.shape[:2], -1))
    mask = token_mask(plan, layout.block, layout)
    assert mask[:, :, video:].all() and mask[..., video:].all()
    assert video in plan.q_starts.view(-1).tolist()
    return mask


def masked_dense(query, key, value, mask):
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


# clusters


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


def labels_of(clusters):
    """Cluster of each token, `[B, H, S]`."""
    sizes = clusters.starts.diff(dim=-1)
    labels = torch.zeros(clusters.order.shape, dtype=torch.int64)
    for b, h in itertools.product(*map(range, sizes.shape[:2])):
        labels[b, h, clusters.order[b, h].long()] = torch.repeat_interleave(sizes[b, h]).long()
    return labels


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


# svg2


def svg2(layout, query, key, state=None, **options):
    options = {"q_clusters": 5, "k_clusters": 9, "first_iterations": 3, **options}
    return load_method("svg2", **options).predict(query, key, layout, None, state)


@pytest.mark.parametrize(("grid", "text"), CASES, ids=str)
def test_svg2_plans_are_well_formed_and_give_masked_attention(grid, text):
    layout = build_layout(grid, "raster", 8, text=text)
    query, key = inputs(layout, batch=2)
    value = randn(*query.shape, seed=5)
    plan = svg2(layout, query, key, keep=0.4)
    mask = assert_well_formed(plan, layout)
    out, _ = block_sparse(query, key, value, plan, impl="reference")
    torch.testing.assert_close(out, masked_dense(query, key, value, mask))
    video = math.ceil(layout.n_video_tokens / 8)
    own = plan.counts[..., :video] == blocks_for(0.4, video) + math.ceil(text / 8)
    assert own.all()
    assert plan.even_k == plan.even_q == (not text or layout.n_video_tokens % 8 == 0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_shares_are_those_of_tokens_that_are_their_centroids(grid):
    layout = build_layout(grid, "raster", 8)
    query, key = (x.transpose(1, 2).double() for x in inputs(layout))
    queries, keys = (cluster_tokens(x, seed_centroids(x, n), 2) for x, n in ((query, 4), (key, 7)))
    found = expected_shares(queries, keys, layout.starts.view(-1), 0.3)
    n = layout.n_tokens
    for h in range(2):
        as_query, as_key = (c.means[0, h][labels_of(c)[0, h]][c.order[0, h].long()] for c in (queries, keys))
        weights = (as_query @ as_key.T * 0.3).softmax(-1)
        for i, j in itertools.product(range(math.ceil(n / 8)), repeat=2):
            true = weights[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].sum(1).mean()
            torch.testing.assert_close(found[0, h, i, j].double(), true, rtol=1e-5, atol=1e-7)


def test_shares_of_clusters_are_weighted_by_size():
    """Blocks that are clusters get the published share |K_j| exp(c_i c_j s) over its sum; an empty cluster none."""
    centres = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [50.0, 50.0]])
    sizes = torch.tensor([8, 16, 8])
    x = centres[:3].repeat_interleave(sizes, 0)[None, None]
    clusters = cluster_tokens(x, centres[None, None], 1)
    shares = expected_shares(clusters, clusters, torch.arange(0, 33, 8, dtype=torch.int32), 0.1)
    c = clusters.means[0, 0]
    true = {}
    full = clusters.starts.diff(dim=-1)[0, 0]
    for i in range(4):
        weights = [float(full[j]) * math.exp(float(c[i] @ c[j]) * 0.1) if full[j] else 0.0 for j in range(4)]
        true[i] = [w / sum(weights) for w in weights]
    owner = [int(j) for j in torch.repeat_interleave(full)[::8]]
    for i, j in itertools.product(range(4), repeat=2):
        split = int(full[owner[j]]) // 8
        assert float(shares[0, 0, i, j]) == pytest.approx(true[owner[i]][owner[j]] / split, rel=1e-5)


@pytest.mark.parametrize("text", [0, 12])
@pytest.mark.parametrize("min_keep", [0.0, 0.5])
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_svg2_reads_the_fewest_blocks_that_hold_the_share(top_p, min_keep, text):
    """Shares are among the video's keys; text is read beside them."""
    layout = build_layout((3, 5, 7), "raster", 8, text=text)
    query, key = inputs(layout, seed=3)
    plan = svg2(layout, query, key, top_p=top_p, min_keep=min_keep)
    clusters = []
    for x, n in ((query, 5), (key, 9)):
        x = x[:, :105].transpose(1, 2)
        clusters.append(cluster_tokens(x, seed_centroids(x, n), 3))
    shares = expected_shares(*clusters, layout.starts.view(-1)[:15], 8**-0.5)
    kept = plan.to_mask()
    sizes = layout.sizes.tolist()
    for h, i in itertools.product(range(2), range(14)):
        row = shares[0, h, i].double().tolist()
        order = sorted(range(14), key=lambda j: (-row[j] / sizes[j], j))
        count = 1
        while sum(row[j] for j in order[:count]) < top_p and count < 14:
            count += 1
        count = max(count, blocks_for(min_keep, 14))
        assert kept[0, h, i, :14].nonzero().flatten().tolist() == sorted(order[:count])
    assert kept[..., 14:].all() and kept[:, :, 14:].all()


@pytest.mark.parametrize(
    "options", [{"keep": 1.0}, {"top_p": 1.0}, {"keep": 0.1, "top_p": 1.0}, {"min_keep": 1.0}]
)
def test_svg2_can_read_everything(options):
    layout = build_layout((3, 5, 7), "raster", 8, text=3)
    query, key = (x * 20 for x in inputs(layout))
    assert svg2(layout, query, key, **options).to_mask().all()


def test_svg2_takes_its_budget():
    layout = build_layout((4, 8, 8), "raster", 8)
    query, key = inputs(layout)
    p90 = svg2(layout, query, key)
    assert torch.equal(p90.counts, svg2(layout, query, key, top_p=0.9).counts)
    both = svg2(layout, query, key, top_p=0.9, keep=0.3)
    assert torch.equal(both.counts, p90.counts.clamp_min(blocks_for(0.3, 32)))
    assert (svg2(layout, query, key, keep=0.05).counts == 2).all(), "min_keep is for top_p alone"


def test_svg2_starts_from_the_step_before_and_each_branch_from_its_own():
    layout = build_layout((3, 5, 7), "raster", 8)
    method = load_method("svg2", keep=0.3, q_clusters=5, k_clusters=9, first_iterations=2, iterations=1)
    steps = [inputs(layout, seed=seed) for seed in (0, 9)]
    other = inputs(layout, seed=20)

    def run(with_other):
        state, apart = method.init_state(steps[0][0], layout), method.init_state(other[0], layout)
        plans = []
        for query, key in steps:
            plans.append(method.predict(query, key, layout, None, state))
            if with_other:
                method.predict(*other, layout, None, apart)
        return plans, state

    plans, state = run(False)
    again, _ = run(True)
    for one, two in zip(plans, again, strict=True):
        assert torch.equal(one.k_order, two.k_order) and torch.equal(one.indices, two.indices)
    # by hand: two iterations from the seeds, then one from what they left
    for name, at in (("query", 0), ("key", 1)):
        first, second = (step[at].transpose(1, 2) for step in steps)
        count = {"query": 5, "key": 9}[name]
        warm = cluster_tokens(first, seed_centroids(first, count), 2).means
        expected = cluster_tokens(second, warm, 1, rearrange=False)
        assert torch.equal(getattr(state, name), expected.means)
        order = plans[1].q_order if name == "query" else plans[1].k_order
        assert torch.equal(order, expected.order)
    fresh = method.predict(*steps[1], layout, None, None)
    assert not torch.equal(fresh.k_order, plans[1].k_order)
    assert torch.equal(fresh.k_order, method.predict(*steps[1], layout, None, None).k_order)


def test_svg2_keeps_centroids_in_the_models_dtype_and_takes_another_number():
    layout = build_layout((3, 5, 7), "raster", 8)
    query, key = (x.bfloat16() for x in inputs(layout))
    method = load_method("svg2", keep=0.3, q_clusters=5, k_clusters=9)
    state = method.init_state(query, layout)
    method.predict(query, key, layout, None, state)
    assert state.query.dtype == state.key.dtype == torch.bfloat16
    load_method("svg2", keep=0.3, q_clusters=6, k_clusters=9).predict(query, key, layout, None, state)
    assert state.query.shape == (1, 2, 6, 8) and state.key.shape == (1, 2, 9, 8)


@pytest.mark.parametrize(("tokens", "q", "k"), [(75600, 302, 1001), (32760, 199, 659), (118800, 379, 1255)])
def test_svg2_has_about_the_published_clusters(tokens, q, k):
    """300, 200 and 400 query clusters; of keys the published 1000 at each size."""
    assert round(1.1 * tokens**0.5) == q and round(3.64 * tokens**0.5) == k


@pytest.mark.parametrize(("grid", "clusters"), [((1, 1, 1), 1), ((1, 2, 3), 50), ((3, 5, 7), 1)])
def test_svg2_with_few_tokens_or_clusters(grid, clusters):
    layout = build_layout(grid, "raster", 8)
    query, key = inputs(layout)
    plan = svg2(layout, query, key, q_clusters=clusters, k_clusters=clusters, keep=0.5)
    assert_well_formed(plan, layout)
    default = load_method("svg2", keep=0.5).predict(query, key, layout, None, None)
    assert_well_formed(default, layout)


def test_svg2_finds_scattered_tokens():
    """Keys that matter to half of the queries lie all over the video: no block of the layout is made of them."""
    layout = build_layout((4, 8, 8), "raster", 8)
    n = layout.n_tokens
    liked = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:64]
    query, key = randn(1, n, 1, 8) * 0.1, randn(1, n, 1, 8, seed=1) * 0.1
    query[:, ::2, :, 0] += 6
    key[:, liked, :, 0] += 6
    plan = svg2(layout, query, key, keep=0.3)
    mask = token_mask(plan, 8, layout)
    assert mask[0, 0, ::2][:, liked].float().mean() > 0.95


@pytest.mark.parametrize(
    "wrong",
    [
        {"q_clusters": 0},
        {"k_clusters": 2.5},
        {"iterations": 0},
        {"first_iterations": True},
        {"min_keep": 1.5},
    ],
    ids=str,
)
def test_svg2_refuses(wrong):
    with pytest.raises(UsageError, match=rf"{next(iter(wrong))}=.* is not possible"):
        load_method("svg2", **wrong)


# svg1


def svg1(layout, query, key, **options):
    return load_method("svg1", **options).predict(query, key, layout, None, None)


def kinds_masks(grid, block, keep, first_frame):
    """What a token of a spatial and of a temporal head reads, bool `[V, V]` in raster order, found by trying all w."""
    places = list(itertools.product(*map(range, grid)))
    n = len(places)
    masks = []
    for rank in (lambda f, r, c: (f, r, c), lambda f, r, c: (r, c, f)):
        order = sorted(range(n), key=lambda t: rank(*places[t]))
        keys = sorted(order, key=lambda t: places[t][0] > 0) if first_frame else order
        at = {token: i for i, token in enumerate(order)}
        q_runs, k_runs = ([o[i : i + block] for i in range(0, n, block)] for o in (order, keys))
        apart = [[min(abs(at[q] - at[k]) for q in a for k in b) for b in k_runs] for a in q_runs]
        sink = [first_frame and any(places[t][0] == 0 for t in b) for b in k_runs]

        def share(w, apart=apart, sink=sink, q_runs=q_runs, k_runs=k_runs):
            return (
                sum(
                    len(a) * len(b)
                    for i, a in enumerate(q_runs)
                    for j, b in enumerate(k_runs)
                    if sink[j] or apart[i][j] <= w
                )
                / n**2
            )

        # a w between two of the distances that occur reads what the lower does
        tried = sorted({0} | {d for row in apart for d, s in zip(row, sink, strict=True) if not s})
        w = min(tried, key=lambda w: (abs(share(w) - keep), w))
        mask = torch.zeros(n, n, dtype=torch.bool)
        for i, j in itertools.product(range(len(q_runs)), repeat=2):
            if sink[j] or apart[i][j] <= w:
                mask[torch.tensor(q_runs[i])[:, None], torch.tensor(k_runs[j])] = True
        masks.append(mask)
    return masks


@pytest.mark.parametrize("first_frame", [False, True])
@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("grid", [(3, 5, 7), (4, 6, 9), (1, 8, 11), (5, 1, 3)], ids=str)
def test_svg1_takes_the_kind_that_covers_more_and_reads_its_blocks(grid, text, first_frame):
    layout = build_layout(grid, "raster", 8, text=text)
    video = layout.n_video_tokens
    query, key = inputs(layout, heads=5, batch=2, seed=2)
    value = randn(*query.shape, seed=5)
    # half of the heads look along the frames, half at their own place
    frame, row, column = layout.coordinates().unbind(1)
    for h, facts in enumerate((frame, row * grid[2] + column)):
        code = randn(int(facts.max()) + 1, 8, seed=h)
        query[:, :video, h], key[:, :video, h] = code[facts] * 2, code[facts] * 2
    plan = svg1(layout, query, key, keep=0.4, first_frame=first_frame, rows=16)
    mask = assert_well_formed(plan, layout)

    spatial, temporal = kinds_masks(grid, 8, 0.4, first_frame)
    rows = spread_tokens(video, 16)
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(8**-0.5).softmax(-1)[:, :, rows, :video]
    covered = [(weights * m[rows]).sum((-1, -2)) for m in (spatial, temporal)]
    expected = torch.where((covered[1] > covered[0])[..., None, None], temporal, spatial)
    assert torch.equal(mask[..., :video, :video], expected)
    out, _ = block_sparse(query, key, value, plan, impl="reference")
    torch.testing.assert_close(out, masked_dense(query, key, value, mask))
    if grid[0] > 1 and grid[1] > 1 and not first_frame and not text:
        kinds = covered[1] > covered[0]
        assert kinds[:, 1].all() and not kinds[:, 0].any()
    if first_frame:
        assert mask[..., : grid[1] * grid[2]].all()


@pytest.mark.parametrize("first_frame", [False, True])
@pytest.mark.parametrize("keep", [0.2, 0.35, 0.6, 1.0])
def test_svg1_reads_about_what_is_asked_for(keep, first_frame):
    layout = build_layout((9, 11, 13), "raster", 16)
    query, key = inputs(layout, heads=3)
    plan = svg1(layout, query, key, keep=keep, first_frame=first_frame)
    read = token_mask(plan, 16, layout).float().mean((2, 3))
    assert (read - keep).abs().max() <= (0.012 if keep < 1 else 0)


@pytest.mark.parametrize("order", ["tiles", "packed", "gilbert"])
def test_svg1_reads_the_same_tokens_in_every_layout(order):
    grid = (4, 6, 9)
    raster, other = build_layout(grid, "raster", 8), build_layout(grid, order, 8)
    query, key = inputs(raster, heads=4)
    options = {"keep": 0.3, "first_frame": True}
    true = token_mask(svg1(raster, query, key, **options), 8, raster)
    moved = svg1(other, other.apply(query, 1), other.apply(key, 1), **options)
    mask = token_mask(moved, 8, other)
    assert torch.equal(other.undo(other.undo(mask, 2), 3), true)


def test_svg1_tries_rows_of_the_whole_video():
    """Heads that are temporal at the end of the video only are told as such: most of the mass is there."""
    layout = build_layout((6, 8, 8), "raster", 16)
    n = layout.n_tokens
    place = layout.coordinates()[:, 1] * 8 + layout.coordinates()[:, 2]
    code = torch.nn.functional.one_hot(place, 64).float() * 6
    query = torch.where((torch.arange(n) > n // 5)[:, None], code, torch.zeros(()))[None, :, None]
    plan = svg1(layout, query, code[None, :, None], keep=0.2)
    assert not torch.equal(plan.q_order[0, 0].long(), torch.arange(n))


def test_svg1_is_spatial_where_it_makes_no_difference():
    layout = build_layout((3, 5, 7), "raster", 8)
    query, key = inputs(layout)
    plan = svg1(layout, query, key, keep=1.0)
    assert plan.to_mask().all()
    assert torch.equal(plan.q_order.long(), torch.arange(105).expand(1, 2, -1))


def test_svg1_works_its_plans_out_once():
    layout = build_layout((3, 5, 7), "raster", 8)
    query, key = inputs(layout)
    one, two = (svg1(layout, query, key, keep=0.4) for _ in range(2))
    assert one.indices.untyped_storage().data_ptr() == two.indices.untyped_storage().data_ptr()
    assert one.counts.shape[:2] == (1, 1) and one.lead == (1, 2)
    assert not torch.equal(svg1(layout, query, key, keep=0.9).counts, one.counts)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rows": 2.5}, {"first_frame": 3}], ids=str)
def test_svg1_refuses(wrong):
    with pytest.raises(UsageError, match=rf"{next(iter(wrong))}=.* is not possible"):
        load_method("svg1", keep=0.3, **wrong)
    with pytest.raises(UsageError, match="needs keep"):
        load_method("svg1")


# both


@pytest.mark.parametrize("name", ["svg1", "svg2"])
def test_a_batch_row_is_the_same_in_other_company(name):
    layout = build_layout((3, 5, 7), "raster", 8)
    method = load_method(name, keep=0.4)
    query, key = inputs(layout, batch=2)
    other = inputs(layout, batch=2, seed=7)
    mixed = [torch.cat([x[:1], y[1:]]) for x, y in zip((query, key), other, strict=True)]

    def mask(*qk):
        return token_mask(method.predict(*qk, layout, None, None), 8, layout)

    together = mask(query, key)
    assert torch.equal(mask(*mixed)[0], together[0]) and torch.equal(mask(query[:1], key[:1])[0], together[0])
    assert not torch.equal(mask(*mixed)[1], together[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["svg1", "svg2"])
def test_low_precision_is_taken(name, dtype):
    layout = build_layout((3, 5, 7), "raster", 8, text=4)
    query, key = (x.to(dtype) for x in inputs(layout))
    assert_well_formed(load_method(name, keep=0.4).predict(query, key, layout, None, None), layout)
