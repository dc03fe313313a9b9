"""svg1 against its formulas, token by token."""

import itertools

import pytest
import torch
from by_token import (
    assert_rows_are_strangers,
    assert_well_formed,
    inputs,
    masked_dense,
    randn,
    token_mask,
)

from dit_accel.errors import UsageError
from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.kernels.coarse import add_block_means
from dit_accel.layout import build_layout
from dit_accel.methods import load_method
from dit_accel.methods.parts.cluster import spread_tokens


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


@pytest.mark.parametrize(("grid", "large"), [((3, 5, 7), True), ((3, 4, 8), True), ((3, 4, 7), False)])
def test_by_default_means_stand_in_where_a_frame_holds_four_blocks(grid, large):
    layout = build_layout(grid, "raster", 8)
    query, key = inputs(layout)
    by_default, asked = (svg1(layout, query, key, keep=0.4, **more) for more in ({}, {"compensation": "all"}))
    assert (by_default.coarse is not None) == large
    assert asked.coarse is not None and torch.equal(by_default.to_mask().expand_as(asked.to_mask()), asked.to_mask())


@pytest.mark.parametrize("first_frame", [False, True])
@pytest.mark.parametrize("text", [0, 5])
def test_means_stand_in_for_what_a_band_leaves_out(text, first_frame):
    """Token by token: a row's attention goes on over the means of its head's blocks, each as many tokens as it has."""
    layout = build_layout((3, 5, 7), "raster", 8, text=text)
    query, key = inputs(layout, heads=4, batch=2, seed=2)
    value = randn(*query.shape, seed=5)
    options = {"keep": 0.3, "first_frame": first_frame, "rows": 16}
    bare = svg1(layout, query, key, **options, compensation="none")
    plan = svg1(layout, query, key, **options, compensation="all")
    assert torch.equal(plan.to_mask(), bare.to_mask().expand_as(plan.to_mask())) and bare.coarse is None

    true = torch.empty(*query.shape, dtype=torch.float64)
    mask = token_mask(bare, 8, layout)
    for b, h in itertools.product(range(2), range(4)):
        order = bare.k_order.expand(2, 4, -1)[b, h].long()
        runs = [order[a:z] for a, z in itertools.pairwise(bare.k_starts.expand(2, 4, -1)[b, h].tolist())]
        q, k, v = (x[b, :, h].double() for x in (query, key, value))
        for t in range(layout.n_tokens):
            read = [i for i in range(layout.n_tokens) if mask[b, h, t, i]]
            unread = [run for run in runs if not mask[b, h, t, run].any()]
            keys = torch.stack([*k[read], *(k[run].mean(0) for run in unread)])
            values = torch.stack([*v[read], *(v[run].mean(0) for run in unread)])
            weights = torch.tensor([1.0] * len(read) + [float(len(run)) for run in unread], dtype=torch.float64)
            scores = (keys @ q[t] * 8**-0.5).exp() * weights
            true[b, t, h] = scores @ values / scores.sum()
    by_head = [x.transpose(1, 2) for x in (query, key, value)]
    out, lse = block_sparse(*by_head, plan, layout="bhsd", impl="reference")
    got = add_block_means(out, lse, *by_head, plan, impl="reference").transpose(1, 2)
    torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-5)


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
    with pytest.raises(UsageError, match="Unknown compensation 'gain'. Allowed: all, auto, none"):
        load_method("svg1", keep=0.3, compensation="gain")


def test_a_batch_row_is_the_same_in_other_company():
    assert_rows_are_strangers(load_method("svg1", keep=0.4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_taken(dtype):
    layout = build_layout((3, 5, 7), "raster", 8, text=4)
    query, key = (x.to(dtype) for x in inputs(layout))
    assert_well_formed(svg1(layout, query, key, keep=0.4), layout)
