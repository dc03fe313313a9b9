"""Compensation: what was not read comes back as mean values."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.kernels.coarse import add_block_means
from dit_accel.plan import BlockPlan

Q_STARTS, K_STARTS = [0, 5, 5, 38, 45], [0, 3, 20, 33]  # one query block is empty


def make(device, lead=(2, 3), head=10, dtype=torch.float32):
    """q, k, v `[B, H, S, D]` and a plan with weights of every block."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*lead, n, head, generator=generator).to(device, dtype) for n in (45, 33, 33))
    mask = torch.rand(*lead, 4, 3, generator=generator) < 0.5
    mask[..., 0] = True
    plan = BlockPlan.from_mask(mask.to(device), Q_STARTS, K_STARTS)
    weights = torch.rand(*lead, 4, 3, generator=generator).to(device) / 4
    return q, k, v, replace(plan, coarse=weights)


def by_hand(out, v, plan):
    """The formula, row by row, in float64."""
    out, v, w = out.double().cpu(), v.double().cpu(), plan.coarse.double().cpu()
    means = torch.stack([v[:, :, a:b].mean(2) for a, b in pairwise(K_STARTS)], 2)
    true = out.clone()
    for i, (a, b) in enumerate(pairwise(Q_STARTS)):
        added = torch.einsum("bhk,bhkd->bhd", w[:, :, i], means)
        true[:, :, a:b] = (1 - w[:, :, i].sum(-1))[..., None, None] * out[:, :, a:b] + added[:, :, None]
    return true


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_against_the_formula(impl, device, dtype):
    q, k, v, plan = make(device, dtype=dtype)
    out, _ = block_sparse(q, k, v, plan, layout="bhsd")
    true = by_hand(out, v, plan)
    given = out.clone()
    assert add_block_means(given, v, plan, impl=impl) is given
    # What rounding the result alone would cost, twice.
    allowed = 2 * (true - true.to(dtype).double()).abs().max() + 1e-5
    assert (given.double().cpu() - true).abs().max() <= allowed


def test_without_weights_nothing_changes(impl, device):
    q, k, v, plan = make(device)
    out, _ = block_sparse(q, k, v, plan, layout="bhsd")
    given = add_block_means(out.clone(), v, replace(plan, coarse=torch.zeros_like(plan.coarse)), impl=impl)
    torch.testing.assert_close(given, out, rtol=0, atol=0)


def test_any_strides_and_broadcast_offsets(impl, device):
    q, k, v, plan = make(device)
    out, _ = block_sparse(q, k, v, plan, layout="bhsd")
    true = by_hand(out, v, plan)
    strided = out.transpose(1, 2).contiguous().transpose(1, 2)
    add_block_means(strided, v.transpose(1, 2).contiguous().transpose(1, 2), plan, impl=impl)
    torch.testing.assert_close(strided.double().cpu(), true, rtol=1e-5, atol=1e-5)
    own = replace(plan, q_starts=plan.q_starts.expand(2, 3, -1).contiguous())
    torch.testing.assert_close(
        add_block_means(out, v, own, impl=impl).double().cpu(), true, rtol=1e-5, atol=1e-5
    )


def test_bad_input_gets_one_clear_error(device):
    q, _, v, plan = make(device)
    with pytest.raises(UsageError, match="needs a plan with coarse weights"):
        add_block_means(q, v, replace(plan, coarse=None))
    with pytest.raises(UsageError, match=r"coarse must be float32 \(2, 3, 4, 3\)"):
        add_block_means(q, v, replace(plan, coarse=plan.coarse[:1]))
    with pytest.raises(UsageError, match="do not fit a plan of 45 query and 33 key tokens"):
        add_block_means(q[:, :, 1:], v, plan)
    with pytest.raises(UsageError, match=r"coarse must be \[B, H, 4, 3\]"):
        replace(plan, coarse=plan.coarse[..., 1:])
