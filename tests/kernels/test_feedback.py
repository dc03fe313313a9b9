"""Which list entries mattered: every implementation against the formula, and the plan that follows from it."""

from __future__ import annotations

import os
from itertools import accumulate, pairwise

import pytest
import torch

from dit_accel.errors import KernelUnavailable, UsageError
from dit_accel.kernels.block_sparse import block_sparse, block_sparse_feedback, why_not
from dit_accel.kernels.block_sparse.reference import margins
from dit_accel.kernels.compaction import compact_lists
from dit_accel.plan import BlockPlan

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors"))
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETING, reason="needs a GPU or TRITON_INTERPRET=1"
    ),
)
SHAPES = {
    "even": ((32, 32, 13), (32,) * 6 + (1,)),
    "longer than a step": ((96, 17), (128, 96, 128, 70, 128, 128)),
    "zero-length": ((0, 40, 0, 17), (0, 30, 0, 64, 0, 20, 20, 0)),
}


def make(shape: str, lead=(2, 2)):
    q_blocks, k_blocks = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape))
    q, k, v = (torch.randn(2, sum(n), 2, 32, generator=generator) for n in (q_blocks, k_blocks, k_blocks))
    mask = torch.rand(*lead, len(q_blocks), len(k_blocks), generator=generator) < 0.7
    starts = [[0, *accumulate(blocks)] for blocks in (q_blocks, k_blocks)]
    plan = BlockPlan.from_mask(mask.to(DEVICE), *starts)
    for first, end in pairwise(starts[1]):  # some blocks matter to all rows, some to none
        k[:, first:end] *= 3 * torch.rand(2, 1, 2, 1, generator=generator) ** 2
    return *((3 * q).to(DEVICE), k.to(DEVICE), v.to(DEVICE)), plan


@pytest.mark.parametrize("impl", ["reference", ON_CPU, TRITON])
@pytest.mark.parametrize("threshold", [-10.0, -2.0, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_verdict_follows_the_formula(shape, threshold, impl):
    q, k, v, plan = make(shape)
    rise = margins(*(x.transpose(1, 2).double() for x in (q, k)), plan, 32**-0.5)
    rise = torch.where((rise - threshold).abs() < 1e-3, torch.nan, rise)  # too close to tell
    out, lse, needed = block_sparse_feedback(q, k, v, plan, threshold, impl=impl)
    clear = ~rise.isnan()
    assert needed.dtype == torch.bool and needed.shape == (2, 2, *plan.indices.shape[2:])
    assert torch.equal(needed[clear], (rise > threshold)[clear]) and clear.float().mean() > 0.99
    if threshold == -2.0:
        read = plan.counts.sum()
        assert 0.1 * read < needed.sum() < 0.9 * read  # both verdicts occur
    plain, plain_lse = block_sparse(q, k, v, plan, impl=impl)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)


@pytest.mark.parametrize("impl", ["reference", ON_CPU, TRITON])
def test_a_plan_for_all_heads_gets_a_verdict_for_each(impl):
    q, k, v, plan = make("even", lead=(1, 1))
    _out, _lse, needed = block_sparse_feedback(q, k, v, plan, -1.0, impl=impl)
    rise = margins(*(x.transpose(1, 2).double() for x in (q, k)), plan, 32**-0.5)
    assert torch.equal(needed, rise > -1.0)
    assert not torch.equal(needed[0, 0], needed[1, 1])


def test_what_is_not_needed_hardly_counts():
    """An entry below the threshold holds at most 2^threshold of each row's largest weight, per token."""
    q, k, v, plan = make("even")
    _out, lse, needed = block_sparse_feedback(q, k, v, plan, -8.0)
    _, short_lse = block_sparse(q, k, v, compact_lists(plan, needed))
    lost = 1 - (short_lse - lse).exp()
    assert 0 < lost.max() < 2.0**-8 * 32 * 7


@pytest.mark.parametrize("lead", [(1, 1), (2, 3)])
@pytest.mark.parametrize("forcing", [False, True])
def test_compaction_keeps_needed_and_forced_entries(impl, forcing, lead):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(*lead, 9, 700, generator=generator) < 0.6  # longer than what is read at once
    mask[:, :, 3] = False
    starts = [*range(10)], [*range(701)]
    plan = BlockPlan.from_mask(mask.to(DEVICE), *starts)
    needed = (torch.rand(2, 3, *plan.indices.shape[2:], generator=generator) < 0.3).to(DEVICE)
    forced = (torch.rand(9, 700, generator=generator) < 0.1).to(DEVICE) if forcing else None
    short = compact_lists(plan, needed, forced, impl=impl)
    columns = plan.indices.expand(2, 3, -1, -1).long()
    wanted = torch.zeros(2, 3, 9, 701, dtype=torch.bool, device=DEVICE)
    slot = torch.arange(plan.indices.shape[3], device=DEVICE)
    listed = slot < plan.counts[..., None]
    wanted.scatter_(3, torch.where(needed & listed, columns, 700), True)
    wanted = wanted[..., :700]
    if forcing:
        wanted |= forced & plan.to_mask()
    assert torch.equal(short.to_mask(), wanted)
    short.check_values()  # ascending
    assert (short.q_starts is plan.q_starts) and short.max_k_block == plan.max_k_block


def test_bad_input_gets_one_clear_error():
    q, k, v, plan = make("even")
    with pytest.raises(UsageError, match="at most 0"):
        block_sparse_feedback(q, k, v, plan, 0.5)
    with pytest.raises(UsageError, match="at most 0"):
        block_sparse_feedback(q, k, v, plan, float("nan"))
    needed = torch.ones(2, 2, *plan.indices.shape[2:], dtype=torch.bool, device=DEVICE)
    with pytest.raises(UsageError, match="needed must be"):
        compact_lists(plan, needed[..., 1:])
    with pytest.raises(UsageError, match="needed must be bool"):
        compact_lists(plan, needed.int())
    with pytest.raises(UsageError, match="forced must be"):
        compact_lists(plan, needed, needed[0, 0].T)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors")
@pytest.mark.parametrize(("impl", "precision"), [("flash4", "full"), ("reference", "int8")])
def test_implementations_without_a_verdict_refuse(impl, precision):
    q, k, v, plan = make("even")
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    assert "which entries mattered" in why_not(impl, *by_head, plan, precision, feedback=True)
    with pytest.raises(KernelUnavailable, match="which entries mattered"):
        block_sparse_feedback(q, k, v, plan, -1.0, impl=impl, precision=precision)
