"""Methods and their parts: what is kept, and why that."""

import itertools
from pathlib import Path

import pytest
import torch

from dit_accel import methods
from dit_accel.errors import UnknownNameError, UsageError
from dit_accel.kernels.counting import count_pairs
from dit_accel.layout import build_layout
from dit_accel.methods import load_method, method_names, method_options
from dit_accel.methods.parts.budget import blocks_for, choose_blocks
from dit_accel.methods.parts.force import forced_blocks
from dit_accel.methods.parts.score import block_means, expected_attention
from dit_accel.trajectory import Call

GRID = (3, 5, 7)


def call(**changes):
    facts = {"run": 1, "branch": "cond", "step": 0, "noise": 0.5, "grid": GRID, "segments": ()}
    return Call(**{**facts, "role": "transformer", "n_layers": 2, "layer": 0, **changes})


def chosen(counts, indices):
    return [
        [row[:n].tolist() for n, row in zip(c, i, strict=True)]
        for c, i in zip(counts[0], indices[0], strict=True)
    ]


@pytest.mark.parametrize(
    ("keep", "n", "blocks"), [(0.1, 30, 3), (0.25, 40, 10), (0.01, 5, 1), (1.0, 7, 7), (0.3, 7, 3)]
)
def test_a_share_stands_for_so_many_blocks(keep, n, blocks):
    assert blocks_for(keep, n) == blocks


def test_equal_scores_go_to_the_lower_index():
    counts, indices = choose_blocks(torch.full((1, 1, 2, 6), 1 / 6), None, 0.5, None)
    assert chosen(counts, indices) == [[[0, 1, 2], [0, 1, 2]]]


def test_forced_blocks_count_towards_the_budget():
    scores = torch.tensor([[[[0.1, 0.2, 0.3, 0.4]] * 4]])
    forced = torch.eye(4, dtype=torch.bool)
    assert chosen(*choose_blocks(scores, forced, 0.5, None)) == [[[0, 3], [1, 3], [2, 3], [2, 3]]]
    # more forced than the budget: all of them are kept
    forced[0] = True
    assert chosen(*choose_blocks(scores, forced, 0.25, None)) == [[[0, 1, 2, 3], [1], [2], [3]]]


def test_the_larger_of_two_budgets_holds_row_by_row():
    scores = torch.tensor([[[[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]]])
    assert chosen(*choose_blocks(scores, None, 0.5, 0.6, scores)) == [[[0, 1], [0, 1, 2]]]
    assert chosen(*choose_blocks(scores, None, None, 0.6, scores)) == [[[0], [0, 1, 2]]]
    assert chosen(*choose_blocks(scores, None, None, 1.0, scores))[0][1] == [0, 1, 2, 3]


def test_indices_ascend_up_to_the_count():
    scores = torch.rand(2, 3, 9, 9)
    counts, indices = choose_blocks(scores, torch.eye(9, dtype=torch.bool), 0.3, 0.8, scores.softmax(-1))
    behind = torch.arange(9) >= counts[..., None]
    assert ((indices.diff(dim=-1) > 0) | behind[..., 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_means_are_those_of_the_blocks(dtype):
    layout = build_layout(GRID, "tiles", 16)
    x = torch.randn(2, layout.n_tokens, 10, 4).to(dtype)  # more heads than are widened at once
    starts = layout.starts.view(-1).tolist()
    true = torch.stack([x[:, a:b].double().mean(1) for a, b in itertools.pairwise(starts)], 2)
    means = block_means(x, layout)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means.double(), true, rtol=1e-5, atol=1e-6)


def test_a_larger_block_is_expected_to_take_more():
    layout = build_layout((1, 1, 20), "raster", 16)  # blocks of 16 and 4
    shares = expected_attention(torch.zeros(1, 1, 2, 2), layout)
    torch.testing.assert_close(shares[0, 0, 0], torch.tensor([0.8, 0.2]))


def test_size_alone_does_not_make_a_block_matter():
    """Kept blocks then hold about the requested share of tokens, whatever their sizes."""
    layout = build_layout((5, 16, 16), "tiles", 128)
    assert layout.sizes.unique().numel() > 1
    query, key = torch.randn(
        2, 1, layout.n_tokens, 8, 16, generator=torch.Generator().manual_seed(0)
    ).unbind()
    plan = load_method("pooled", keep=0.5, neighbours=None).predict(query, key, layout, call(), None)
    assert abs(int(count_pairs(plan)) / plan.n_pairs - 0.5) < 0.04


def test_forced_neighbours_and_first_frame():
    layout = build_layout((8, 8, 8), "tiles", 16)
    own = forced_blocks(layout, 0, False)
    assert torch.equal(own, torch.eye(layout.n_blocks, dtype=torch.bool))
    near = forced_blocks(layout, 1, False)
    assert torch.equal(near, near.T) and near.sum(-1).max() <= 7 and (near & own).sum() == layout.n_blocks
    first = forced_blocks(layout, None, True)
    assert (
        torch.equal(first, layout.first_frame[None].expand_as(first)) and 0 < first[0].sum() < layout.n_blocks
    )
    assert forced_blocks(layout, None, False) is None
    raster = build_layout((4, 8, 8), "raster", 48)
    assert raster.first_frame.tolist() == [True, True, False, False, False, False]


def test_pooled_finds_the_blocks_that_matter():
    """Keys of two blocks point along the queries; both are kept, for every head and row."""
    layout = build_layout((3, 5, 7), "raster", 16)
    key = torch.randn(2, layout.n_tokens, 3, 8)
    query = torch.ones(2, layout.n_tokens, 3, 8)
    key[:, 32:48] += 2
    key[:, 96:] += 2
    plan = load_method("pooled", keep=0.4, neighbours=None).predict(query, key, layout, call(), None)
    kept = plan.to_mask()
    assert kept.shape == (2, 3, 7, 7) and kept[..., 2].all() and kept[..., 6].all()
    assert (kept.sum(-1) == 3).all()


def test_random_draws_again_for_each_place_and_the_same_in_each_run():
    layout = build_layout(GRID, "tiles", 8)
    query = torch.randn(2, layout.n_tokens, 3, 8)
    method = load_method("random", keep=0.3)

    def draw(**place):
        return method.predict(query, query, layout, call(**place), None).to_mask()

    first = draw()
    assert torch.equal(first, draw(run=2))
    for place in ({"step": 1}, {"layer": 1}, {"branch": "uncond"}):
        assert not torch.equal(first, draw(**place))
    assert (first.sum(-1) == blocks_for(0.3, layout.n_blocks)).all() and first.diagonal(
        dim1=-2, dim2=-1
    ).all()


def test_methods_are_found_by_file_name():
    assert method_names() == sorted(path.stem for path in Path(methods.__file__).parent.glob("[a-z]*.py"))
    assert {"lite", "pooled", "random", "rectified", "sparge"} <= set(method_names())
    assert method_options("pooled") == {"neighbours", "first_frame"}
    with pytest.raises(UnknownNameError, match=r"method 'poled'.*Did you mean 'pooled'"):
        load_method("poled")
    with pytest.raises(UnknownNameError, match=r"'neighbors'.*Did you mean 'neighbours'"):
        load_method("pooled", keep=0.5, neighbors=1)
    with pytest.raises(UsageError, match="needs a budget"):
        load_method("pooled")
    with pytest.raises(UsageError, match="needs keep"):
        load_method("random")


def test_a_layout_remembers_what_is_forced_in_it_and_counts_the_bytes():
    layout = build_layout((3, 5, 7), "tiles", 16, "cpu")
    before = layout.bytes_held()
    forced = forced_blocks(layout, 1, True)
    assert forced_blocks(layout, 1, True) is forced
    assert not torch.equal(forced_blocks(layout, 0, False), forced)
    assert layout.bytes_held() == before + 2 * layout.n_blocks**2
