"""The kernels as operators: one graph, correct shapes for the compiler, no recompilation per plan."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

import dit_accel.kernels.block_sparse.op
import dit_accel.kernels.compaction.op
import dit_accel.kernels.counting.op
import dit_accel.kernels.pooling.op
import dit_accel.kernels.selection.op  # noqa: F401
from dit_accel.kernels.block_sparse import block_sparse, block_sparse_feedback
from dit_accel.kernels.block_sparse.op import fields_of, plan_of
from dit_accel.kernels.compaction import compact_lists
from dit_accel.kernels.counting import count_pairs
from dit_accel.kernels.pooling import block_means
from dit_accel.kernels.selection import select_blocks
from dit_accel.plan import BlockPlan, uniform_starts

OPS = torch.ops.dit_accel


def predict_and_attend(q, k, v, starts, least):
    """From queries and keys `[B, S, H, D]` to the outputs of two calls, the second of what the first found needed, and
    the pairs that the first read."""
    tokens = q.shape[1]
    scores = block_means(q, starts, 16) @ block_means(k, starts, 16).transpose(2, 3)
    counts, indices = select_blocks(scores, None, least)
    plan = BlockPlan(counts, indices, starts, starts, tokens, tokens, 16, 16)
    out, lse, needed = block_sparse_feedback(q, k, v, plan, -1.0)
    return *block_sparse(q, k, v, compact_lists(plan, needed)), out, lse, count_pairs(plan)


def inputs(tokens=100, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        *(torch.randn(1, tokens, heads, 8, generator=generator) for _ in range(3)),
        uniform_starts(tokens, 16),
    )


def test_prediction_and_attention_are_one_graph():
    compiled = torch.compile(predict_and_attend, fullgraph=True, backend="aot_eager", dynamic=False)
    for seed in range(3):
        expected = predict_and_attend(*inputs(seed=seed), 3)
        found = compiled(*inputs(seed=seed), 3)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)


def test_other_numbers_do_not_compile_again():
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(predict_and_attend, fullgraph=True, backend=count, dynamic=False)
    for seed in range(3):
        compiled(*inputs(seed=seed), 3)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operators_are_sound(dtype):
    q, k, v, starts = (x.to(dtype) if x.is_floating_point() else x for x in inputs())
    plan = BlockPlan.from_mask(torch.rand(1, 2, 7, 7) < 0.5, starts, starts)
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    scores = torch.randn(1, 2, 7, 7)
    checks = ("test_schema", "test_faketensor")  # there is no backward
    torch.library.opcheck(
        OPS.block_sparse, (*by_head, *fields_of(plan), 0.3, "cpu", "full"), test_utils=checks
    )
    torch.library.opcheck(
        OPS.block_sparse_feedback,
        (*by_head, *fields_of(plan), 0.3, "cpu", "full", -2.0),
        test_utils=checks,
    )
    needed = torch.rand(1, 2, *plan.indices.shape[2:]) < 0.5
    torch.library.opcheck(
        OPS.compact_lists, (plan.counts, plan.indices, needed, None, "auto"), test_utils=checks
    )
    torch.library.opcheck(OPS.block_means, (q, starts, 16, "reference"), test_utils=checks)
    torch.library.opcheck(
        OPS.select_blocks, (scores, None, 3, None, None, None, None, None, None, "auto"), test_utils=checks
    )
    forced, shares = torch.eye(7, dtype=torch.bool), scores.softmax(-1)
    torch.library.opcheck(
        OPS.select_blocks, (scores, forced, 3, 0.7, shares, None, None, 0.5, None, "auto"), test_utils=checks
    )
    budgets = torch.tensor(3, dtype=torch.int32), torch.tensor(0.7)
    torch.library.opcheck(
        OPS.select_blocks,
        (scores, None, None, None, shares, *budgets, None, torch.tensor(0.5), "auto"),
        test_utils=checks,
    )
    torch.library.opcheck(OPS.count_pairs, (*fields_of(plan)[:4], [100, 100, 16, 16], "auto"), test_utils=checks)


def test_an_operator_gets_all_of_a_plan_that_the_host_knows():
    starts = uniform_starts(100, 16)
    plan = BlockPlan.full(starts, starts)
    plan = replace(plan, even_k=True, even_q=True, longest_first=True)
    q = torch.zeros(1, 2, 100, 8)
    again = plan_of(q, q, *fields_of(plan))
    for field in fields(BlockPlan):
        found, given = getattr(again, field.name), getattr(plan, field.name)
        assert torch.equal(found, given) if isinstance(given, torch.Tensor) else found == given, field.name
