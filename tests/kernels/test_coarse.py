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
    masses = torch.randn(*lead, 4, 3, generator=generator).to(device)
    masses[..., 2, :] = -torch.inf  # nothing stands in
    return q, k, v, replace(plan, coarse=masses)


def by_hand(out, lse, v, plan):
    """The formula, row by row, in float64."""
    out, v, w = out.double().cpu(), v.double().cpu(), plan.coarse.double().cpu().exp()
    means = torch.stack([v[:, :, a:b].mean(2) for a, b in pairwise(K_STARTS)], 2)
    true = out.clone()
    for i, (a, b) in enumerate(pairwise(Q_STARTS)):
        read = lse[:, :, a:b].double().cpu().exp()
        if plan.rest is not None:
            read = plan.rest[:, :, i : i + 1].double().cpu().exp().expand_as(read)
        added = torch.einsum("bhk,bhkd->bhd", w[:, :, i], means)
        weighed = read[..., None] * out[:, :, a:b] + added[:, :, None]
        true[:, :, a:b] = weighed / (read + w[:, :, i].sum(-1)[..., None])[..., None]
    return true


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_against_the_formula(impl, device, dtype, measured):
    q, k, v, plan = make(device, dtype=dtype)
    if not measured:
        rest = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).to(device)
        plan = replace(plan, rest=rest)
    out, lse = block_sparse(q, k, v, plan, layout="bhsd")
    true = by_hand(out, lse, v, plan)
    given = out.clone()
    assert add_block_means(given, lse, v, plan, impl=impl) is given
    # What rounding the result alone would cost, twice.
    allowed = 2 * (true - true.to(dtype).double()).abs().max() + 1e-5
    assert (given.double().cpu() - true).abs().max() <= allowed
    assert torch.equal(given[:, :, 5:38], out[:, :, 5:38])  # where nothing stands in


def test_without_masses_nothing_changes(impl, device):
    q, k, v, plan = make(device)
    out, lse = block_sparse(q, k, v, plan, layout="bhsd")
    empty = replace(plan, coarse=torch.full_like(plan.coarse, -torch.inf))
    torch.testing.assert_close(add_block_means(out.clone(), lse, v, empty, impl=impl), out, rtol=0, atol=0)
    unread = torch.full_like(lse, -torch.inf)
    torch.testing.assert_close(add_block_means(out.clone(), unread, v, empty, impl=impl), out, rtol=0, atol=0)


def test_rows_that_read_nothing_get_the_means(impl, device):
    q, k, v, plan = make(device)
    nothing = replace(plan, counts=torch.zeros_like(plan.counts))
    out, lse = block_sparse(q, k, v, nothing, layout="bhsd")
    given = add_block_means(out, lse, v, nothing, impl=impl).double().cpu()
    means = torch.stack([v[:, :, a:b].double().cpu().mean(2) for a, b in pairwise(K_STARTS)], 2)
    true = plan.coarse[:, :, 3].double().cpu().softmax(-1)[..., None, :] @ means
    torch.testing.assert_close(given[:, :, 38:], true.expand(-1, -1, 7, -1), rtol=1e-5, atol=1e-5)
    assert not given[:, :, 5:38].any()


def test_any_strides_and_broadcast_offsets(impl, device):
    q, k, v, plan = make(device)
    out, lse = block_sparse(q, k, v, plan, layout="bhsd")
    true = by_hand(out, lse, v, plan)
    strided = out.transpose(1, 2).contiguous().transpose(1, 2)
    turned = v.transpose(1, 2).contiguous().transpose(1, 2)
    add_block_means(strided, lse.transpose(1, 2).contiguous().transpose(1, 2), turned, plan, impl=impl)
    torch.testing.assert_close(strided.double().cpu(), true, rtol=1e-5, atol=1e-5)
    own = replace(plan, q_starts=plan.q_starts.expand(2, 3, -1).contiguous())
    given = add_block_means(out, lse, v, own, impl=impl).double().cpu()
    torch.testing.assert_close(given, true, rtol=1e-5, atol=1e-5)


def test_bad_input_gets_one_clear_error(device):
    q, _, v, plan = make(device)
    with pytest.raises(UsageError, match="needs a plan with coarse masses"):
        add_block_means(q, q[..., 0], v, replace(plan, coarse=None))
    with pytest.raises(UsageError, match=r"coarse must be float32 \(2, 3, 4, 3\)"):
        add_block_means(q, q[..., 0], v, replace(plan, coarse=plan.coarse[:1]))
    with pytest.raises(UsageError, match="do not fit a plan of 45 query and 33 key tokens"):
        add_block_means(q[:, :, 1:], q[:, :, 1:, 0], v, plan)
    with pytest.raises(UsageError, match=r"coarse must be \[B, H, 4, 3\]"):
        replace(plan, coarse=plan.coarse[..., 1:])
    with pytest.raises(UsageError, match="rest comes with coarse"):
        replace(plan, coarse=None, rest=plan.coarse[..., 0])
