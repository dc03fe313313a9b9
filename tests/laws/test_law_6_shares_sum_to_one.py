"""Law 6: what a method weighs blocks by is a share of the whole."""

import pytest
import torch

from dit_accel.layout import build_layout
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
