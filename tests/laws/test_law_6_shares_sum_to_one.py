"""Law 6: what a method weighs blocks by is a share of the whole."""

import pytest
import torch

from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.kernels.coarse import add_block_means
from dit_accel.layout import build_layout
from dit_accel.methods import load_method
from dit_accel.methods.parts.score import block_means, expected_attention, mean_scores


@pytest.mark.parametrize("grid", [(3, 5, 7), (2, 8, 8)], ids=str)
def test_expected_attention_sums_to_one(grid):
    layout = build_layout(grid, "tiles", 16)
    query, key = torch.randn(2, 2, layout.n_tokens, 3, 8).unbind()
    shares = expected_attention(mean_scores(query, block_means(key, layout), layout), layout)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3, layout.n_blocks))


def test_expected_attention_is_exact_where_blocks_are_uniform():
    """If every token equals its block's mean, the expected share is the true one."""
    layout = build_layout((3, 5, 7), "tiles", 16)
    block_of = torch.repeat_interleave(torch.arange(layout.n_blocks), layout.sizes.long())
    query, key = (torch.randn(1, layout.n_blocks, 2, 8)[:, block_of] for _ in range(2))
    true = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", query, key) * 8**-0.5, -1)
    true = torch.zeros(1, 2, len(block_of), layout.n_blocks).index_add_(-1, block_of, true)
    shares = expected_attention(mean_scores(query, block_means(key, layout), layout), layout)
    torch.testing.assert_close(shares[:, :, block_of], true)


FREE = dict(top_p=0.01, neighbours=None, anchor=False)  # little is forced, so that much is left to the means


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("rectified", {**FREE, "compensation": kind, "mass": mass}, id=f"rectified-{kind}-{mass}")
        for kind in ("gain", "all")
        for mass in ("measured", "predicted")
    ]
    + [pytest.param("svg1", {"compensation": "all"}, id="svg1-all")],
)
def test_compensation_sums_to_one(name, options):
    """Values that are all alike come out as they are, however little is read."""
    layout = build_layout((3, 5, 7), "gilbert", 16, text=9)
    query, key = (3 * torch.randn(2, layout.n_tokens, 3, 8) for _ in range(2))
    value = torch.ones_like(query) * torch.tensor([1.0, -2.0, 3.0])[:, None]
    plan = load_method(name, keep=0.15, **options).predict(query, key, layout, None, None)
    assert plan.coarse.isfinite().any()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = block_sparse(q, k, v, plan, layout="bhsd")
    torch.testing.assert_close(add_block_means(out, lse, q, k, v, plan), v, rtol=1e-5, atol=1e-5)
