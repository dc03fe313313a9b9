"""nabla against its formulas: block means, softmax, the smallest set that holds the share, and the window."""

import itertools
import tomllib

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.layout import ORDERS, build_layout
from dit_accel.methods import load_method
from dit_accel.methods.parts.budget import blocks_for

FLOORLESS = 0.001  # as published: one block at least
GRIDS = [(3, 5, 7), (4, 9, 10), (1, 17, 20)]


def tokens(layout, seed=0, batch=2, heads=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    size = (2, batch, layout.n_tokens, heads, 8)
    query, key = (torch.randn(size, generator=generator) * 2).to(dtype).unbind()
    # neighbours resemble one another, so that means of blocks differ
    drift = torch.randn(2, batch, layout.n_blocks, heads, 8, generator=generator) * 2
    of = torch.repeat_interleave(torch.arange(layout.n_blocks), layout.sizes.long())
    return query + drift[0][:, of].to(dtype), key + drift[1][:, of].to(dtype)


def shares_of(query, key, layout):
    """Predicted attention per key block of the video, float64 `[B, H, N, N]`, by the paper's formula.

    Its blocks are all of one size; a smaller one has the share of the tokens it has, as if each were the mean.
    """
    ends = list(itertools.pairwise(layout.starts.view(-1).tolist()))
    n = layout.n_video_blocks
    q, k = (torch.stack([x[:, a:b].double().mean(1) for a, b in ends], 2) for x in (query, key))
    weights = (q @ k[:, :, :n].mT / query.shape[-1] ** 0.5).exp()
    weights = weights * torch.tensor([b - a for a, b in ends[:n]], dtype=torch.float64)
    return weights / weights.sum(-1, keepdim=True)


def smallest_set(shares, top_p):
    """As published: ascending, and of the running sum what reaches 1 - top_p."""
    ascending = shares.sort(-1)
    kept = ascending.values.cumsum(-1) >= 1 - top_p
    return torch.zeros_like(kept).scatter(-1, ascending.indices, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.95])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nabla_reads_the_smallest_set_that_holds_the_share(grid, top_p, dtype):
    for layout in (
        build_layout(grid, "tiles", 64, tile=(1, 8, 8)),
        build_layout(grid, "tiles", 6, tile=(1, 2, 3)),
        *(build_layout(grid, order, 8) for order in ORDERS),
    ):
        query, key = tokens(layout, dtype=dtype)
        plan = load_method("nabla", keep=FLOORLESS, top_p=top_p).predict(query, key, layout, None, None)
        assert plan.lead == (2, 3) and plan.key_means is not None
        true = shares_of(query, key, layout)
        kept = plan.to_mask()
        assert torch.equal(kept, smallest_set(true, top_p))
        mass = (true * kept).sum(-1)
        assert (mass > top_p - 1e-6).all()
        least = torch.where(kept, true, torch.inf).amin(-1)
        assert (mass - least < top_p + 1e-6).all()


def test_every_row_reads_a_tenth_at_least():
    """The floor is ours: rows that foretell a peak read the best blocks beside it."""
    layout = build_layout((4, 9, 10), "raster", 8)
    query, key = tokens(layout)
    shares = shares_of(query, key, layout)
    plan = load_method("nabla", top_p=0.05).predict(query, key, layout, None, None)
    floor = blocks_for(0.1, layout.n_blocks)
    needed = smallest_set(shares, 0.05).sum(-1)
    assert torch.equal(plan.counts.long(), needed.clamp_min(floor)) and (needed < floor).any()
    best = shares.topk(floor, dim=-1).indices
    assert plan.to_mask().gather(-1, best).all()


def test_a_border_tile_counts_for_the_tokens_it_has():
    """All keys alike: shares are those of the tokens, and a mean is not diluted by what a tile lacks."""
    layout = build_layout((1, 10, 16), "tiles", 64, tile=(1, 8, 8))
    assert layout.sizes.tolist() == [64, 64, 16, 16]
    query = torch.randn(1, layout.n_tokens, 1, 8)
    key = torch.ones_like(query)
    for top_p, read in ((0.39, [0]), (0.7, [0, 1]), (0.85, [0, 1, 2]), (0.95, [0, 1, 2, 3])):
        plan = load_method("nabla", keep=FLOORLESS, top_p=top_p).predict(query, key, layout, None, None)
        assert (plan.counts == len(read)).all() and plan.indices[0, 0, 0, : len(read)].tolist() == read


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_keep_is_a_floor(keep):
    layout = build_layout((3, 9, 10), "tiles", 6, tile=(1, 2, 3))
    query, key = tokens(layout)
    alone = load_method("nabla").predict(query, key, layout, None, None)
    plan = load_method("nabla", keep=keep).predict(query, key, layout, None, None)
    least = blocks_for(keep, layout.n_blocks)
    assert torch.equal(plan.counts, alone.counts.clamp(min=least))
    assert (plan.to_mask() | alone.to_mask()).equal(plan.to_mask())


def window_mask(grid, tile, window):
    """Tiles within half a window on each axis, one by one; the window stays where it is at the edges."""
    counts = [-(-n // edge) for n, edge in zip(grid, tile, strict=True)]
    places = list(itertools.product(*map(range, counts)))
    reach = [n // 2 for n in window]
    return torch.tensor(
        [[all(abs(a - b) <= r for a, b, r in zip(i, j, reach, strict=True)) for j in places] for i in places]
    )


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 3), (2, 3, 5), (11, 3, 3)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_window_is_added_to_what_was_chosen(grid, window):
    tile = (1, 2, 3)
    layout = build_layout(grid, "tiles", 6, tile=tile)
    query, key = tokens(layout)
    alone = load_method("nabla", keep=FLOORLESS, top_p=0.5).predict(query, key, layout, None, None)
    plan = load_method("nabla", keep=FLOORLESS, top_p=0.5, window=window).predict(query, key, layout, None, None)
    assert torch.equal(plan.to_mask(), alone.to_mask() | window_mask(grid, tile, window))
    assert plan.key_means is not None
    plan.check_values()


def test_the_window_is_not_moved_inward():
    layout = build_layout((3, 10, 15), "tiles", 6, tile=(1, 2, 3))
    query = torch.zeros(1, layout.n_tokens, 1, 8)
    near = load_method("nabla", keep=FLOORLESS, top_p=0.01, window=(3, 3, 3)).predict(query, query, layout, None, None)
    assert (
        int(near.counts[0, 0, 0]) == 8 and int(near.counts[0, 0, 25 + 12]) == 27 + 1
    )  # a corner; the middle


def test_balanced_tiles_have_windows_too():
    layout = build_layout((5, 7, 9), "tiles", 16)
    query, key = tokens(layout)
    plan = load_method("nabla", keep=FLOORLESS, top_p=0.1, window=(99, 99, 99)).predict(query, key, layout, None, None)
    assert (plan.counts == layout.n_blocks).all()


@pytest.mark.parametrize("window", [None, [3, 3, 3]])
def test_text_is_read_by_all_reads_all_and_takes_no_share(window):
    layout = build_layout((3, 9, 10), "tiles", 6, tile=(1, 2, 3), text=13)
    query, key = tokens(layout)
    n = layout.n_video_blocks
    assert layout.n_blocks == n + 3
    key[:, layout.n_video_tokens :] *= 10  # would take the whole share
    mask = load_method("nabla", keep=FLOORLESS, window=window).predict(query, key, layout, None, None).to_mask()
    assert mask[:, :, n:].all() and mask[..., n:].all()
    true = smallest_set(shares_of(query, key, layout), 0.7)[:, :, :n]
    if window:
        true = true | window_mask((3, 9, 10), (1, 2, 3), window)
    assert torch.equal(mask[:, :, :n, :n], true) and not true.all()


def test_rows_and_heads_do_not_see_one_another():
    layout = build_layout((3, 9, 10), "tiles", 6, tile=(1, 2, 3))
    query, key = tokens(layout)
    method = load_method("nabla", keep=FLOORLESS, window=[1, 3, 3])
    both = method.predict(query, key, layout, None, None).to_mask()
    for row, head in itertools.product(range(2), range(3)):
        one = [x[row : row + 1, :, head : head + 1] for x in (query, key)]
        assert torch.equal(method.predict(*one, layout, None, None).to_mask()[0, 0], both[row, head])


def test_a_thousand_small_shares_add_up():
    """In bfloat16 the numbers from 1/2 to 1 are 1/256 apart, four of these shares."""
    layout = build_layout((16, 8, 8), "raster", 1)
    query = torch.zeros(1, layout.n_tokens, 1, 8, dtype=torch.bfloat16)
    plan = load_method("nabla", keep=FLOORLESS, top_p=0.75).predict(query, query, layout, None, None)
    assert (plan.counts - 768).abs().max() <= 1


def test_options():
    table = tomllib.loads("top_p = 0.6\nwindow = [11, 3, 3]")
    method = load_method("nabla", keep=FLOORLESS, **table)
    assert method == load_method("nabla", keep=FLOORLESS, top_p=0.6, window=(11, 3, 3)) and hash(method)
    assert load_method("nabla").top_p == 0.7
    for window in ([3, 3], 3, [0, 3, 3], [1.0, 3, 3], [True, 1, 1]):
        with pytest.raises(UsageError, match="window=.*list of three.*whole number of tiles from 1"):
            load_method("nabla", keep=FLOORLESS, window=window)


@pytest.mark.parametrize("order", ["raster", "packed", "gilbert"])
def test_a_window_needs_tiles(order):
    layout = build_layout((3, 5, 7), order, 16)
    query, key = tokens(layout)
    load_method("nabla").predict(query, key, layout, None, None)
    with pytest.raises(UsageError, match=rf"window=\(1, 3, 3\).*counts tiles, and order '{order}' has none"):
        load_method("nabla", keep=FLOORLESS, window=(1, 3, 3)).predict(query, key, layout, None, None)
