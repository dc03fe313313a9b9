"""The gradients of block-sparse attention: the reference against float64 autograd of dense attention under the plan's
token mask, Triton against the reference.

The Triton cases run on a GPU, or in a process started with TRITON_INTERPRET=1 (test_triton.py starts one).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

import dit_accel.kernels.block_sparse.trainable_op
import dit_accel.kernels.inversion.op  # noqa: F401
from dit_accel.errors import KernelUnavailable, UnknownNameError, UsageError
from dit_accel.kernels.block_sparse import block_sparse, block_sparse_trainable
from dit_accel.plan import BlockPlan

# name: query block lengths, key block lengths, batch, heads
SHAPES = {
    "one block": ((20,), (20,), 1, 1),
    "odd lengths": ((32, 32, 13), (32, 32, 32, 1), 1, 2),
    "unequal blocks": ((96, 70), (70, 96, 33), 1, 1),
    "zero-length blocks": ((0, 40, 0, 17), (0, 30, 0, 40, 0), 2, 1),
    "few queries many keys": ((20,), (16,) * 4 + (9,), 2, 2),
}


def make(shape: str, dtype: torch.dtype, head: int, device: str, plan: str = "random"):
    """q, k, v `[B, H, S, D]` and a plan: "random", "empty" rows and columns, "shared" by all heads, or "none"."""
    q_blocks, k_blocks, batch, heads = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape) * 1000 + head)
    q, k, v = (
        torch.randn(batch, heads, sum(blocks), head, generator=generator).to(device, dtype)
        for blocks in (q_blocks, k_blocks, k_blocks)
    )
    lead = (1, 1) if plan == "shared" else (batch, heads)
    mask = torch.rand(*lead, len(q_blocks), len(k_blocks), generator=generator) < 0.5
    mask[..., 0] |= plan != "empty"
    if plan in ("empty", "none"):
        mask[..., 1 if len(q_blocks) > 1 else 0, :] = False
        mask[..., -1] = False
    mask &= plan != "none"
    starts = ([0, *accumulate(q_blocks)], [0, *accumulate(k_blocks)])
    return q, k, v, BlockPlan.from_mask(mask.to(device), *starts)


def pulls(q: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse, in the type in which they come."""
    generator = torch.Generator().manual_seed(seed)
    grad_lse = torch.randn(q.shape[:3], generator=generator).to(q.device)
    return (
        torch.randn(q.shape, generator=generator).to(q.device, q.dtype),
        grad_lse.double() if q.dtype == torch.float64 else grad_lse,
    )


def gradients(q, k, v, plan, impl: str, grad_out: Tensor, grad_lse: Tensor, **options) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_trainable(*leaves, plan, impl=impl, **options)
    return torch.autograd.grad((out, lse), leaves, (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))


def dense_gradients(q, k, v, plan, grad_out: Tensor, grad_lse: Tensor, scale: float | None = None):
    """Autograd, float64, of N x N attention in which whole rows may be masked."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = plan.to_token_mask()
    scores = leaves[0] @ leaves[1].transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    # A row that is masked whole would have NaN gradients: it is attended freely and weighs nothing in the loss.
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask | empty), -torch.inf)
    out, lse = scores.softmax(-1) @ leaves[2], scores.logsumexp(-1)
    seen = (~empty[..., 0]).expand(q.shape[:3])
    loss = (out * grad_out.double())[seen].sum() + (lse * grad_lse.double())[seen].sum()
    return torch.autograd.grad(loss, leaves)


def assert_within_low_precision_error(found, plain, exact) -> None:
    """Each gradient's error against float64 is at most twice that of the reference in the inputs' own type."""
    for name, x, y, z in zip(("dq", "dk", "dv"), found, plain, exact, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and x.isfinite().all(), name
        allowed = 2 * (y - z).norm() + 8 * torch.finfo(torch.float32).eps * z.norm()
        assert (x - z).norm() <= allowed, (name, float((x - z).norm() / allowed))
        assert (x[z == 0] == 0).all(), name  # what nothing reads


def check(q, k, v, plan, impl: str, **options) -> None:
    grad_out, grad_lse = pulls(q)
    found = gradients(q, k, v, plan, impl, grad_out, grad_lse, **options)
    plain = gradients(q, k, v, plan, "reference", grad_out, grad_lse, **options)
    exact = dense_gradients(q, k, v, plan, grad_out, grad_lse, **options)
    assert_within_low_precision_error(found, plain, exact)


@pytest.mark.parametrize("plan", ["random", "empty", "shared", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_gradient_of_masked_dense_attention(shape: str, plan: str):
    q, k, v, plan = make(shape, torch.float64, 16, "cpu", plan)
    grad_out, grad_lse = pulls(q)
    found = gradients(q, k, v, plan, "reference", grad_out, grad_lse)
    torch.testing.assert_close(
        found, dense_gradients(q, k, v, plan, grad_out, grad_lse), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_numerical_gradients(impl: str):
    q, k, v, plan = make("zero-length blocks", torch.float64, 3, "cpu", "random")
    q, k, v = (x[:1].clone().requires_grad_() for x in (q, k, v))
    plan = BlockPlan.from_mask(plan.to_mask()[:1], plan.q_starts, plan.k_starts)
    torch.autograd.gradcheck(
        lambda *qkv: block_sparse_trainable(*qkv, plan, impl=impl, scale=0.7), (q, k, v), fast_mode=True
    )


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_values_are_those_of_block_sparse(layout: str):
    q, k, v, plan = make("odd lengths", torch.float32, 16, "cpu", "empty")
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = block_sparse(q, k, v, plan, layout=layout)
    found = block_sparse_trainable(q.requires_grad_(), k, v, plan, layout=layout)
    assert all(x.requires_grad and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_second_derivatives_and_misfits_are_refused():
    q, k, v, plan = make("one block", torch.float32, 16, "cpu")
    q.requires_grad_()
    out, _ = block_sparse_trainable(q, k, v, plan)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UsageError, match="no second derivative"):
        first.sum().backward()
    with pytest.raises(UsageError, match="call block_sparse_trainable"):
        block_sparse(q, k, v, plan, layout="bhsd")
    with pytest.raises(UsageError, match="covers 20 query tokens, but there are 19"):
        block_sparse_trainable(q[:, :, :19], k, v, plan)
    with pytest.raises(UnknownNameError, match="Did you mean 'triton'"):
        block_sparse_trainable(q, k, v, plan, impl="tritn")
    with pytest.raises(KernelUnavailable, match="impl='triton' cannot run this call"):
        block_sparse_trainable(q.double(), k.double(), v.double(), plan, impl="triton")


def test_one_graph_with_its_backward():
    """Compiled whole, forward and backward, with token orders; the same gradients as without."""
    q, k, v, plan = make("odd lengths", torch.float32, 16, "cpu")
    order = torch.randperm(77, generator=torch.Generator().manual_seed(3)).int()[None, None]
    plan = replace(plan, q_order=order)

    def loss(q, k, v):
        out, lse = block_sparse_trainable(q, k * 2, v, plan)
        return (out * torch.arange(16.0)).sum() + lse.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for run in (loss, compiled):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(run(*leaves), leaves))
    torch.testing.assert_close(*results)


def test_operators_are_sound():
    q, k, v, plan = make("odd lengths", torch.float32, 16, "cpu")
    order = torch.randperm(77).int()[None, None]
    for q_order in (None, order):
        arguments = (plan.counts, plan.indices, plan.q_starts, plan.k_starts, q_order, None, [32, 32, 0, 0], 0.3)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(torch.ops.dit_accel.block_sparse_trainable, (*leaves, *arguments, "cpu"))
    torch.library.opcheck(torch.ops.dit_accel.invert_lists, (plan.counts, plan.indices, plan.n_k, "reference"))


@pytest.mark.parametrize("shape", ["odd lengths", "few queries many keys"])
def test_token_orders(impl: str, device: str, shape: str):
    """Different for every head, on both sides; the token mask undoes them."""
    q, k, v, plan = make(shape, torch.float32, 16, device)
    generator = torch.Generator().manual_seed(5)

    def order(tokens: int) -> Tensor:
        rows = [torch.randperm(tokens, generator=generator) for _ in range(q.shape[1])]
        return torch.stack(rows)[None].int().to(device)

    check(q, k, v, replace(plan, q_order=order(q.shape[2]), k_order=order(k.shape[2])), impl)
