"""BlockPlan: lists, masks, fractions, coarsening, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.plan import BlockPlan, uniform_starts

Q, K = [0, 3, 3, 7, 20], [0, 1, 5, 5, 9, 30]


def random_plan(batch: int = 2, heads: int = 3) -> tuple[BlockPlan, torch.Tensor]:
    mask = torch.rand(batch, heads, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    return BlockPlan.from_mask(mask, Q, K), mask


def test_lists_are_the_mask_in_ascending_order():
    plan, mask = random_plan()
    for row in range(4):
        kept = plan.indices[1, 2, row, : plan.counts[1, 2, row]].tolist()
        assert kept == mask[1, 2, row].nonzero().flatten().tolist()
    assert torch.equal(plan.to_mask(), mask)
    assert plan.indices.min() >= 0 and plan.indices.max() < plan.n_k


def test_host_numbers():
    plan, _ = random_plan()
    assert (plan.n_q, plan.n_k, plan.n_q_tokens, plan.n_k_tokens) == (4, 5, 20, 30)
    assert (plan.max_q_block, plan.max_k_block, plan.lead) == (13, 21, (2, 3))


@pytest.mark.parametrize(
    ("starts", "even"),
    [
        ([0, 4, 8, 12], True),
        ([0, 4, 8, 9], True),
        ([0, 3], True),
        ([0, 4, 6, 10], False),
        ([0, 4, 8, 14], False),
        ([0, 4, 4], False),
        (torch.tensor([[[0, 4, 7]], [[0, 3, 7]]]), False),
    ],
)
def test_even_key_blocks_are_noticed(starts, even):
    mask = torch.ones(1, 1, 1, (starts.shape[-1] if torch.is_tensor(starts) else len(starts)) - 1).bool()
    assert BlockPlan.from_mask(mask, [0, 5], starts).even_k == even
    assert BlockPlan.from_mask(mask.transpose(2, 3), starts, [0, 5]).even_q == even


def test_a_false_claim_of_even_key_blocks_is_refused():
    plan = BlockPlan.full([0, 5], [0, 4, 6, 10])
    with pytest.raises(UsageError, match="even_k says"):
        dataclasses.replace(plan, even_k=True)
    plan = BlockPlan.full([0, 4, 6, 10], [0, 5])
    with pytest.raises(UsageError, match="even_q says that all query blocks"):
        dataclasses.replace(plan, even_q=True)


def test_token_mask_follows_the_blocks():
    plan, mask = random_plan()
    tokens = plan.to_token_mask()
    assert tokens.shape == (2, 3, 20, 30)
    assert torch.equal(
        tokens[:, :, 7:], mask[:, :, 3:].repeat_interleave(torch.tensor(K).diff(), 3).expand(-1, -1, 13, -1)
    )
    assert plan.n_pairs == tokens.numel()


def test_offsets_may_differ_between_heads():
    starts = torch.tensor([[[0, 2, 8], [0, 6, 8]]], dtype=torch.int32)
    mask = torch.eye(2, dtype=torch.bool)[None, None]
    plan = BlockPlan.from_mask(mask, starts, starts)
    assert plan.lead == (1, 2) and plan.to_token_mask().sum((0, 2, 3)).tolist() == [4 + 36, 36 + 4]


def test_full_keeps_everything():
    plan = BlockPlan.full(uniform_starts(100, 16), uniform_starts(77, 16))
    assert plan.to_token_mask().all()
    assert (plan.n_q, plan.n_k, plan.max_q_block) == (7, 5, 16)


@pytest.mark.parametrize("factors", [(1, 1), (2, 1), (1, 2), (3, 4)], ids=str)
def test_coarsening_never_drops(factors):
    plan, _ = random_plan()
    coarse = plan.coarsen(*factors)
    assert (coarse.to_token_mask() | ~plan.to_token_mask()).all()
    assert coarse.n_q == -(-4 // factors[0]) and coarse.n_k == -(-5 // factors[1])


def test_coarsening_is_or():
    mask = torch.tensor([[True, False, False, False], [False] * 4])[None, None]
    plan = BlockPlan.from_mask(mask, [0, 1, 2], [0, 1, 2, 3, 4]).coarsen(2, 2)
    assert plan.to_mask().tolist() == [[[[True, False]]]]


def test_plans_are_frozen():
    plan, _ = random_plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.max_q_block = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.zeros(1, 1, 2, dtype=torch.int64)}, "counts must be int32"),
        ({"counts": torch.zeros(1, 2, dtype=torch.int32)}, "counts must have 3 dimensions"),
        ({"counts": torch.full((1, 1, 2), 9, dtype=torch.int32)}, r"counts must lie in 0\.\.2"),
        ({"indices": torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)}, "ascend strictly"),
        ({"indices": torch.tensor([[[[0, 5], [0, 1]]]], dtype=torch.int32)}, r"indices must lie in 0\.\.1"),
        ({"indices": torch.zeros(1, 1, 3, 2, dtype=torch.int32)}, "must be counts"),
        ({"q_starts": torch.tensor([[[0, 5, 3]]], dtype=torch.int32)}, "q_starts must rise from 0"),
        ({"k_starts": torch.tensor([[[1, 4, 8]]], dtype=torch.int32)}, "k_starts must rise from 0"),
        ({"q_starts": torch.tensor([[[0, 8]]], dtype=torch.int32)}, "one offset more than the 2"),
        ({"max_k_block": 2}, "more than max_k_block=2"),
        ({"k_starts": torch.tensor([[[0, 4, 8]] * 2], dtype=torch.int32).expand(3, 2, 3)}, None),
    ],
)
def test_bad_values_are_refused(change, message):
    good = dict(
        counts=torch.full((1, 1, 2), 2, dtype=torch.int32),
        indices=torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32),
        q_starts=torch.tensor([[[0, 4, 8]]], dtype=torch.int32),
        k_starts=torch.tensor([[[0, 4, 8]]], dtype=torch.int32),
        n_q_tokens=8, n_k_tokens=8, max_q_block=4, max_k_block=4,
    )  # fmt: skip
    if message is None:
        assert BlockPlan(**good | change).lead == (3, 2)
        return
    with pytest.raises(UsageError, match=message):
        BlockPlan(**good | change)


def test_bad_masks_are_refused():
    with pytest.raises(UsageError, match="mask must be bool"):
        BlockPlan.from_mask(torch.ones(1, 1, 2, 2), [0, 1, 2], [0, 1, 2])
    with pytest.raises(UsageError, match="k_starts must hold 3 offsets"):
        BlockPlan.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), [0, 1, 2], [0, 1])
    with pytest.raises(UsageError, match="n_tokens >= 1"):
        uniform_starts(0, 4)


def test_orders_are_undone():
    """What a plan with orders of its own reads, and what block_sparse gives for it, is told of tokens as they came."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (20, 30, 30))
    orders = [
        torch.stack([torch.randperm(n, generator=generator) for _ in range(6)]).view(2, 3, n).int()
        for n in (20, 30)
    ]
    mask = torch.rand(2, 3, 3, 4, generator=generator) < 0.6
    mask[..., 0] = True
    plan = BlockPlan.from_mask(mask, [0, 8, 15, 20], [0, 8, 16, 24, 30])
    for some in (
        {"q_order": orders[0]},
        {"k_order": orders[1]},
        {"q_order": orders[0], "k_order": orders[1][:1, :1]},
    ):
        ordered = dataclasses.replace(plan, **some)
        read = ordered.to_token_mask()
        for b, h, i, j in ((0, 0, 3, 5), (1, 2, 19, 29), (1, 0, 9, 17)):
            own = [
                x.expand(2, 3, -1)[b, h].long() if x is not None else None
                for x in (ordered.q_order, ordered.k_order)
            ]
            token = i if own[0] is None else own[0][i], j if own[1] is None else own[1][j]
            assert read[b, h, token[0], token[1]] == plan.to_token_mask()[b, h, i, j]
        logits = (q @ k.transpose(2, 3) * 8**-0.5).masked_fill(~read, -torch.inf)
        for impl in ("reference", "cpu"):
            out, lse = block_sparse(q, k, v, ordered, layout="bhsd", impl=impl)
            torch.testing.assert_close(out, logits.softmax(-1) @ v, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="q_order must be int32"):
        dataclasses.replace(plan, q_order=orders[0].long())
    with pytest.raises(UsageError, match=r"must have q's batch and heads \(2, 3\), or 1"):
        block_sparse(q, k, v, dataclasses.replace(plan, q_order=orders[0][:, :2]), layout="bhsd")
