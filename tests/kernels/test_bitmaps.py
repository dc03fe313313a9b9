"""Bitmaps: lists go in and come out again."""

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.kernels.bitmaps import pack_lists, unpack_lists
from dit_accel.plan import BlockPlan


@pytest.mark.parametrize("n_k", [1, 31, 32, 33, 300])
def test_lists_come_back(impl, device, n_k):
    mask = torch.rand(2, 3, 5, n_k, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[0, 0, 0] = False
    mask[0, 0, 1] = True
    starts = list(range(n_k + 1))
    plan = BlockPlan.from_mask(mask.to(device), list(range(6)), starts)
    bits = pack_lists(plan, impl=impl)
    assert bits.dtype == torch.int32 and bits.shape == (2, 3, 5, -(-n_k // 32))
    counts, indices = unpack_lists(bits, n_k, impl=impl)
    assert torch.equal(counts, plan.counts)
    for row, true, n in zip(indices.flatten(0, 2), plan.indices.flatten(0, 2), counts.flatten(), strict=True):
        assert torch.equal(row[:n], true[:n])


def test_what_stands_behind_the_counts_does_not_matter(impl, device):
    counts = torch.tensor([[[2]]], dtype=torch.int32, device=device)
    indices = torch.tensor([[[[1, 33, 7, 7]]]], dtype=torch.int32, device=device)
    starts = torch.arange(41, dtype=torch.int32, device=device)[None, None]
    plan = BlockPlan(counts, indices, starts[..., :2], starts, 1, 40, 1, 1)
    assert pack_lists(plan, impl=impl).tolist() == [[[[2, 2]]]]


def test_the_last_bit_of_a_word_is_a_block_like_others(impl, device):
    plan = BlockPlan.from_mask(
        torch.ones(1, 1, 1, 64, dtype=torch.bool, device=device), [0, 1], list(range(65))
    )
    assert pack_lists(plan, impl=impl).tolist() == [[[[-1, -1]]]]


def test_a_bitmap_of_another_width_is_refused():
    with pytest.raises(UsageError, match=r"int32 \[B, H, Nq, 2\] for 40 key blocks"):
        unpack_lists(torch.zeros(1, 1, 1, 1, dtype=torch.int32), 40)
