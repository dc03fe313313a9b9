"""svg2 against its formulas, token by token."""

import itertools
import math

import pytest
import torch
from by_token import (
    assert_rows_are_strangers,
    assert_well_formed,
    inputs,
    labels_of,
    masked_dense,
    randn,
    token_mask,
)

from dit_accel.errors import UsageError
from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.layout import build_layout
from dit_accel.methods import load_method
from dit_accel.methods.parts.budget import blocks_for
from dit_accel.methods.parts.cluster import cluster_tokens, seed_centroids
from dit_accel.methods.parts.runs import cut_clusters
from dit_accel.methods.svg2 import expected_shares

GRIDS = [(3, 5, 7), (4, 9, 10), (1, 8, 11), (5, 1, 3)]
CASES = list(itertools.product(GRIDS, [0, 5, 19]))


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
    of_video = (plan.q_starts.diff(dim=-1) > 0) & (plan.q_starts[..., :-1] < layout.n_video_tokens)
    assert (plan.counts[of_video] == blocks_for(0.4, video) + math.ceil(text / 8)).all()
    assert plan.even_k == (not text or layout.n_video_tokens % 8 == 0) and not plan.even_q


@pytest.mark.parametrize("text", [0, 11])
def test_a_block_of_queries_holds_one_cluster(text):
    """Blocks begin with each cluster and every 8 tokens in it, clusters one behind the other; the rest is empty."""
    layout = build_layout((4, 9, 10), "raster", 8, text=text)
    starts = torch.tensor([[[0, 0, 1, 17, 17, 25, 360], [0, 8, 16, 100, 101, 101, 360]]], dtype=torch.int32)
    q_starts, owner = cut_clusters(starts, layout)
    for h in range(2):
        wanted = []
        for cluster, (first, after) in enumerate(itertools.pairwise(starts[0, h].tolist())):
            wanted += [(at, min(at + 8, after), cluster) for at in range(first, after, 8)]
        wanted += [(at, min(at + 8, 360 + text), 7) for at in range(360, 360 + text, 8)]
        found = [
            (first, after, own)
            for (first, after), own in zip(
                itertools.pairwise(q_starts[0, h].tolist()), owner[0, h].tolist(), strict=True
            )
            if first < after
        ]
        assert found == wanted
        assert q_starts[0, h, -1] == 360 + text


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_shares_are_those_of_tokens_that_are_their_centroids(grid):
    layout = build_layout(grid, "raster", 8)
    query, key = (x.transpose(1, 2).double() for x in inputs(layout))
    queries, keys = (cluster_tokens(x, seed_centroids(x, n), 2) for x, n in ((query, 4), (key, 7)))
    found = expected_shares(queries, keys, layout.starts.view(-1), 0.3)
    for h in range(2):
        as_key = keys.means[0, h][labels_of(keys)[0, h]][keys.order[0, h].long()]
        weights = (queries.means[0, h] @ as_key.T * 0.3).softmax(-1)
        for j in range(layout.n_blocks):
            true = weights[:, 8 * j : 8 * j + 8].sum(1)
            torch.testing.assert_close(found[0, h, :, j].double(), true, rtol=1e-5, atol=1e-7)


def test_shares_of_clusters_are_weighted_by_size():
    """Runs that are clusters get the published share |K_j| exp(c_i c_j s) over its sum; an empty cluster none."""
    centres = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [50.0, 50.0]])
    sizes = torch.tensor([8, 16, 8])
    x = centres[:3].repeat_interleave(sizes, 0)[None, None]
    clusters = cluster_tokens(x, centres[None, None], 1)
    shares = expected_shares(clusters, clusters, torch.arange(0, 33, 8, dtype=torch.int32), 0.1)
    c = clusters.means[0, 0]
    full = clusters.starts.diff(dim=-1)[0, 0]
    owner = [int(j) for j in torch.repeat_interleave(full)[::8]]
    for i, j in itertools.product(range(4), repeat=2):
        weights = [float(full[m]) * math.exp(float(c[i] @ c[m]) * 0.1) if full[m] else 0.0 for m in range(4)]
        split = int(full[owner[j]]) // 8
        true = weights[owner[j]] / sum(weights) / split
        assert float(shares[0, 0, i, j]) == pytest.approx(true, rel=1e-5)


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
    _, owner = cut_clusters(clusters[0].starts, layout)
    for h, i in itertools.product(range(2), range(owner.shape[2])):
        cluster = int(owner[0, h, i])
        if cluster >= 5:
            assert kept[0, h, i].all() if cluster == 6 else not kept[0, h, i].any()
            continue
        row = shares[0, h, cluster].double().tolist()
        order = sorted(range(14), key=lambda j: (-row[j] / sizes[j], j))
        count = 1
        while sum(row[j] for j in order[:count]) < top_p and count < 14:
            count += 1
        count = max(count, blocks_for(min_keep, 14))
        assert kept[0, h, i, :14].nonzero().flatten().tolist() == sorted(order[:count])
        assert kept[0, h, i, 14:].all()


@pytest.mark.parametrize(
    "options", [{"keep": 1.0}, {"top_p": 1.0}, {"keep": 0.1, "top_p": 1.0}, {"min_keep": 1.0}]
)
def test_svg2_can_read_everything(options):
    layout = build_layout((3, 5, 7), "raster", 8, text=3)
    query, key = (x * 20 for x in inputs(layout))
    assert assert_well_formed(svg2(layout, query, key, **options), layout).all()


def test_svg2_takes_its_budget():
    layout = build_layout((4, 8, 8), "raster", 8)
    query, key = inputs(layout)
    p90 = svg2(layout, query, key)
    assert torch.equal(p90.counts, svg2(layout, query, key, top_p=0.9).counts)
    both = svg2(layout, query, key, top_p=0.9, keep=0.3)
    there = p90.q_starts.diff(dim=-1) > 0
    assert torch.equal(both.counts[there], p90.counts[there].clamp_min(blocks_for(0.3, 32)))
    assert (svg2(layout, query, key, keep=0.05).counts[there] == 2).all(), "min_keep is for top_p alone"


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


def test_svg2_does_not_drown_a_small_object():
    """Six queries that alone need certain keys get them, however many other queries stand beside them."""
    layout = build_layout((4, 8, 8), "raster", 16)
    query, key = randn(1, 256, 1, 8) * 0.1, randn(1, 256, 1, 8, seed=1) * 0.1
    few, needed = torch.arange(40, 256, 40), torch.arange(3, 256, 25)
    query[:, :, :, 1] += 3
    key[:, :, :, 1] += torch.linspace(0, 3, 256)[:, None]
    query[:, few, :, 0] += 9
    key[:, needed, :, 0] += 9
    mask = token_mask(svg2(layout, query, key, keep=0.15, first_iterations=8), 16, layout)
    assert mask[0, 0][few][:, needed].all()


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


def test_a_batch_row_is_the_same_in_other_company():
    assert_rows_are_strangers(load_method("svg2", keep=0.4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_taken(dtype):
    layout = build_layout((3, 5, 7), "raster", 8, text=4)
    query, key = (x.to(dtype) for x in inputs(layout))
    assert_well_formed(svg2(layout, query, key, keep=0.4), layout)
