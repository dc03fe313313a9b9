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


def by_hand(out, lse, q, k, v, plan):
    """The formulas, row by row, in float64."""
    out, q, k, v, w = (x.double().cpu() for x in (out, q, k, v, plan.coarse))
    keys, values = (torch.stack([x[:, :, a:b].mean(2) for a, b in pairwise(K_STARTS)], 2) for x in (k, v))
    true = out.clone()
    for i, (a, b) in enumerate(pairwise(Q_STARTS)):
        if plan.rest is None:
            read = lse[:, :, a:b].double().cpu().exp()
            scores = torch.einsum("bhqd,bhkd->bhqk", q[:, :, a:b], keys) * 10**-0.5
            masses = (w[:, :, i : i + 1] + scores).exp()
        else:
            read = plan.rest[:, :, i : i + 1].double().cpu().exp().expand(-1, -1, b - a)
            masses = w[:, :, i : i + 1].exp().expand(-1, -1, b - a, -1)
        weighed = read[..., None] * out[:, :, a:b] + masses @ values
        true[:, :, a:b] = weighed / (read + masses.sum(-1))[..., None]
    return true


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_against_the_formulas(impl, device, dtype, measured):
    q, k, v, plan = make(device, dtype=dtype)
    if not measured:
        rest = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).to(device)
        plan = replace(plan, rest=rest)
    out, lse = block_sparse(q, k, v, plan, layout="bhsd")
    true = by_hand(out, lse, q, k, v, plan)
    given = out.clone()
    assert add_block_means(given, lse, q, k, v, plan, impl=impl) is given
    # What rounding the result alone would cost, twice; the means are rounded too before they are multiplied.
    rounded = (true - true.to(dtype).double()).abs().max()
    allowed = 2 * rounded + (5e-3 if dtype == torch.float16 and measured else 0) + 1e-5
    assert (given.double().cpu() - true).abs().max() <= allowed
    torch.testing.assert_close(given[:, :, 5:38], out[:, :, 5:38], rtol=0, atol=0)  # where nothing stands in


def test_more_means_than_are_taken_at_once(impl, device):
    """Every key a block of its own: what is not read comes back exactly, and attention is dense again."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator).to(device) for n in (150, 200, 200))
    mask = torch.rand(1, 2, 2, 200, generator=generator) < 0.3
    plan = BlockPlan.from_mask(mask.to(device), [0, 128, 150], list(range(201)))
    plan = replace(
        plan, coarse=torch.zeros(1, 2, 2, 200, device=device).masked_fill(mask.to(device), -torch.inf)
    )
    out, lse = block_sparse(q, k, v, plan, layout="bhsd", impl="reference")
    given = add_block_means(out, lse, q, k, v, plan, impl=impl)
    dense = torch.softmax(q @ k.transpose(2, 3) * 16**-0.5, -1) @ v
    torch.testing.assert_close(given, dense, rtol=1e-4, atol=1e-5)


def test_without_means_nothing_changes(impl, device):
    q, k, v, plan = make(device)
    out, lse = block_sparse(q, k, v, plan, layout="bhsd")
    empty = replace(plan, coarse=torch.full_like(plan.coarse, -torch.inf))
    given = add_block_means(out.clone(), lse, q, k, v, empty, impl=impl)
    torch.testing.assert_close(given, out, rtol=0, atol=0)
    nothing = replace(empty, rest=torch.full_like(plan.coarse[..., 0], -torch.inf))
    given = add_block_means(out.clone(), lse, q, k, v, nothing, impl=impl)
    torch.testing.assert_close(given, out, rtol=0, atol=0)


def test_rows_that_read_nothing_get_the_means(impl, device):
    q, k, v, plan = make(device)
    nothing = replace(plan, counts=torch.zeros_like(plan.counts))
    out, lse = block_sparse(q, k, v, nothing, layout="bhsd")
    given = add_block_means(out.clone(), lse, q, k, v, nothing, impl=impl)
    assert not given[:, :, 5:38].any()
    by_block = replace(nothing, rest=torch.full_like(plan.coarse[..., 0], -torch.inf))
    values = torch.stack([v[:, :, a:b].double().cpu().mean(2) for a, b in pairwise(K_STARTS)], 2)
    true = plan.coarse[:, :, 3].double().cpu().softmax(-1)[..., None, :] @ values
    given = add_block_means(out, lse, q, k, v, by_block, impl=impl).double().cpu()
    torch.testing.assert_close(given[:, :, 38:], true.expand(-1, -1, 7, -1), rtol=1e-5, atol=1e-5)


def test_any_strides_and_broadcast_offsets(impl, device):
    q, k, v, plan = make(device)
    out, lse = block_sparse(q, k, v, plan, layout="bhsd")
    true = by_hand(out, lse, q, k, v, plan)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (out, lse, q, k, v)]
    add_block_means(*turned, plan, impl=impl)
    torch.testing.assert_close(turned[0].double().cpu(), true, rtol=1e-5, atol=1e-5)
    own = replace(plan, q_starts=plan.q_starts.expand(2, 3, -1).contiguous())
    given = add_block_means(out, lse, q, k, v, own, impl=impl).double().cpu()
    torch.testing.assert_close(given, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ordered", ["q", "k", "both"])
def test_blocks_of_orders_of_their_own(impl, device, ordered):
    """As if queries and keys had come in those orders, which differ from row to row and head to head."""
    q, k, v, plan = make(device)
    generator = torch.Generator().manual_seed(4)
    q_order, k_order = (
        torch.rand(2, 3, n, generator=generator).argsort(-1).to(device, torch.int32) for n in (45, 33)
    )
    if ordered != "q":
        plan = replace(plan, k_order=k_order)
    if ordered != "k":
        plan = replace(plan, q_order=q_order)

    def taken(x, order):
        return x if order is None else x.gather(2, order.long()[..., None].expand(-1, -1, -1, x.shape[3]))

    sorted_q, sorted_k, sorted_v = taken(q, plan.q_order), taken(k, plan.k_order), taken(v, plan.k_order)
    plain = replace(plan, q_order=None, k_order=None)
    out, lse = block_sparse(sorted_q, sorted_k, sorted_v, plain, layout="bhsd")
    true = by_hand(out, lse, sorted_q, sorted_k, sorted_v, plain)

    out, lse = block_sparse(q, k, v, plan, layout="bhsd")
    before = out.clone()
    given = add_block_means(out, lse, q, k, v, plan, impl=impl)
    assert given is out and not torch.equal(given, before)
    torch.testing.assert_close(taken(given, plan.q_order).double().cpu(), true, rtol=1e-5, atol=1e-5)


def test_bad_input_gets_one_clear_error(device):
    q, k, v, plan = make(device)
    with pytest.raises(UsageError, match="needs a plan with coarse weights"):
        add_block_means(q, q[..., 0], q, k, v, replace(plan, coarse=None))
    with pytest.raises(UsageError, match=r"coarse must be float32 \(2, 3, 4, 3\)"):
        add_block_means(q, q[..., 0], q, k, v, replace(plan, coarse=plan.coarse[:1]))
    with pytest.raises(UsageError, match="do not fit a plan of 45 query and 33 key tokens"):
        add_block_means(q[:, :, 1:], q[:, :, 1:, 0], q, k, v, plan)
    with pytest.raises(UsageError, match=r"coarse must be \[B, H, 4, 3\]"):
        replace(plan, coarse=plan.coarse[..., 1:])
    with pytest.raises(UsageError, match="rest comes with coarse"):
        replace(plan, coarse=None, rest=plan.coarse[..., 0])
