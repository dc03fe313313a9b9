"""Counting what plans read, against their masks token by token."""

from __future__ import annotations

import pytest
import torch

from dit_accel.errors import KernelUnavailable, UnknownNameError
from dit_accel.kernels.counting import count_pairs
from dit_accel.plan import BlockPlan

Q_STARTS, K_STARTS = [0, 64, 64, 97, 225], [0, 128, 128, 131, 200, 328]


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_pairs_are_those_of_the_token_mask(impl: str, device: str, lead: tuple[int, int], share: float):
    mask = torch.rand(*lead, 4, 5, generator=torch.Generator().manual_seed(7)) < share
    plan = BlockPlan.from_mask(mask.to(device), Q_STARTS, K_STARTS)
    counted = count_pairs(plan, impl=impl)
    assert counted.dtype == torch.int64 and counted.device == plan.device
    assert int(counted) == int(plan.to_token_mask().sum())
    assert plan.n_pairs == lead[0] * lead[1] * 225 * 328


def test_blocks_of_every_head_may_differ(impl: str, device: str):
    mask = torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(8)) < 0.6
    starts = torch.tensor([[[0, 10, 50], [0, 33, 50]]], dtype=torch.int32, device=device)
    plan = BlockPlan.from_mask(mask.to(device), starts, starts, n_q_tokens=50, n_k_tokens=50,
                               max_q_block=40, max_k_block=40)  # fmt: skip
    assert int(count_pairs(plan, impl=impl)) == int(plan.to_token_mask().sum())


def test_long_lists_and_what_stands_behind_them(impl: str, device: str):
    """Lists longer than a kernel reads at once; entries behind a count are never followed."""
    counts = torch.tensor([[[300, 1]]], dtype=torch.int32)
    indices = torch.arange(300, dtype=torch.int32).expand(1, 1, 2, 300).clone()
    indices[0, 0, 1, 1:] = 299
    k_starts = (torch.arange(301, dtype=torch.int32) * 3)[None, None]
    q_starts = torch.tensor([[[0, 5, 7]]], dtype=torch.int32)
    plan = BlockPlan(*(x.to(device) for x in (counts, indices, q_starts, k_starts)), 7, 900, 5, 3)
    assert int(count_pairs(plan, impl=impl)) == 5 * 900 + 2 * 3


def test_a_named_choice_runs_or_raises():
    plan = BlockPlan.full([0, 4], [0, 4])
    with pytest.raises(UnknownNameError, match="triton"):
        count_pairs(plan, impl="tritn")
    try:
        assert int(count_pairs(plan, impl="triton")) == 16  # where it is interpreted
    except KernelUnavailable as refused:
        assert "triton" in str(refused)
