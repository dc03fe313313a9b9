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
from dit_accel.kernels.block_sparse.backward import differentiate, why_not, workspace_bytes
from dit_accel.kernels.block_sparse.op import fields_of
from dit_accel.kernels.inversion import invert_plan
from dit_accel.plan import BlockPlan

OPS = torch.ops.dit_accel

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


def assert_within_low_precision_error(found, plains, exact) -> None:
    """Each gradient's error against float64 is at most twice that of the reference in the inputs' own type.

    Args:
        plains: the reference's gradients, of one run or of several; the largest error counts.
    """
    for name, x, ys, z in zip(("dq", "dk", "dv"), found, zip(*plains, strict=True), exact, strict=True):
        assert x.shape == ys[0].shape and x.dtype == ys[0].dtype and x.isfinite().all(), name
        allowed = 2 * max((y - z).norm() for y in ys) + 8 * torch.finfo(torch.float32).eps * z.norm()
        assert (x - z).norm() <= allowed, (name, float((x - z).norm() / allowed))
        assert (x[z == 0] == 0).all(), name  # what nothing reads


def check(q, k, v, plan, impl: str, **options) -> None:
    grad_out, grad_lse = pulls(q)
    found = gradients(q, k, v, plan, impl, grad_out, grad_lse, **options)
    plain = gradients(q, k, v, plan, "reference", grad_out, grad_lse, **options)
    exact = dense_gradients(q, k, v, plan, grad_out, grad_lse, **options)
    assert_within_low_precision_error(found, [plain], exact)


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
        out, lse = block_sparse_trainable(q, k * 2, v, plan, layout="bshd")
        return (out * torch.arange(16.0)).sum() + lse.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for run in (loss, compiled):
        leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(run(*leaves), leaves))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_operators_are_sound(layout: str, ordered: bool):
    """Among other things, what the compiler is told of the strides of results is true."""
    q, k, v, plan = make("odd lengths", torch.float32, 16, "cpu")
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    order = torch.randperm(77).int()[None, None] if ordered else None
    *tensors, host = fields_of(plan)
    fields = (*tensors, order, None, host, 0.3)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(OPS.block_sparse_trainable, (*leaves, *fields, "cpu"))
    out, lse = OPS.block_sparse_trainable(q, k, v, *fields, "cpu")
    checks = ("test_schema", "test_faketensor")  # there is no second derivative
    torch.library.opcheck(
        OPS.block_sparse_backward, (*pulls(q), q, k, v, out, lse, *fields, "reference"), test_utils=checks
    )
    torch.library.opcheck(
        OPS.invert_lists, (plan.counts, plan.indices, plan.n_k, "reference"), test_utils=checks
    )


@pytest.mark.parametrize("shape", ["odd lengths", "few queries many keys"])
def test_token_orders(impl: str, device: str, shape: str):
    """Different for every head, on both sides; the token mask undoes them."""
    q, k, v, plan = make(shape, torch.float32, 16, device)
    generator = torch.Generator().manual_seed(5)

    def order(tokens: int) -> Tensor:
        rows = [torch.randperm(tokens, generator=generator) for _ in range(q.shape[1])]
        return torch.stack(rows)[None].int().to(device)

    plan = replace(plan, q_order=order(q.shape[2]), k_order=order(k.shape[2]))
    check(q, k, v, plan, impl)
    wide, given = [x.double() for x in (q, k, v)], pulls(q.double())
    exact = dense_gradients(*wide, plan, *given)
    torch.testing.assert_close(gradients(*wide, plan, "reference", *given), exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plan", ["random", "empty"])
def test_every_shape(impl: str, device: str, shape: str, plan: str):
    check(*make(shape, torch.float32, 64 if plan == "random" else 16, device, plan), impl)


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_type_and_head_size(impl: str, device: str, dtype: torch.dtype, head: int):
    check(*make("odd lengths", dtype, head, device, "shared"), impl)


@pytest.mark.parametrize(("head", "dtype"), [(8, torch.float32), (72, torch.float16), (256, torch.float16)])
def test_unusual_head_sizes_and_scales(impl: str, device: str, head: int, dtype: torch.dtype):
    check(*make("few queries many keys", dtype, head, device), impl, scale=-0.1)


def sink_call(device: str, dtype: torch.dtype, shared: bool = False):
    """Batch 2; key blocks 0 and 4 are read by all 20 query blocks, the others by one or two."""
    generator = torch.Generator().manual_seed(9)
    q_starts, k_starts = [0, *accumulate([4, 3] * 10)], [0, *accumulate([8, 5, 20, 7, 40, 1])]
    mask = torch.rand(*((1, 1) if shared else (2, 1)), 20, 6, generator=generator) < 0.08
    mask[..., [0, 4]] = True
    q, k, v = (torch.randn(2, 1, n, 16, generator=generator).to(device, dtype) for n in (70, 81, 81))
    return q, k, v, BlockPlan.from_mask(mask.to(device), q_starts, k_starts)


@pytest.mark.parametrize("shared", [False, True])
def test_sinks_are_summed_from_chunks(impl: str, device: str, shared: bool):
    q, k, v, plan = sink_call(device, torch.float32, shared)
    items = invert_plan(plan, impl=impl).items
    assert (items[..., 3] > 1).any(-1).all()  # every head has a column that is cut
    check(q, k, v, plan, impl)


def test_equal_inputs_give_equal_gradients(impl: str, device: str):
    q, k, v, plan = sink_call(device, torch.float16)
    first, second = (gradients(q, k, v, plan, impl, *pulls(q)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_triton_holds_what_is_declared(device: str, monkeypatch: pytest.MonkeyPatch):
    """What the launch allocates beside the gradients, summed over its calls of `torch.empty`."""
    if why_not("triton", torch.zeros(1, 1, 4, 16, device=device), BlockPlan.full([0, 4], [0, 4])):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    q, k, v, plan = sink_call(device, torch.float32)
    out, lse = block_sparse(q, k, v, plan, layout="bhsd", impl="reference")
    create, sizes = torch.empty, []

    def count(*args, **kwargs):
        sizes.append(create(*args, **kwargs))
        return sizes[-1]

    monkeypatch.setattr(torch, "empty", count)
    differentiate(*pulls(q), q, k, v, out, lse, plan, 0.25, "triton")
    spent = sum(x.numel() * x.element_size() for x in sizes)
    assert spent == workspace_bytes(2, 1, 16, plan) and spent > 0


def test_any_strides(impl: str, device: str):
    """Slices of one [B, S, 3, H, D] tensor, and gradients that are one number seen everywhere."""
    packed = torch.randn(2, 77, 3, 2, 16, generator=torch.Generator().manual_seed(2)).to(device)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    starts = [0, 32, 64, 77]
    plan = BlockPlan.full(torch.tensor(starts, device=device), torch.tensor(starts, device=device))
    one = torch.ones((), device=device)
    known = dict(grad_out=one.expand(q.shape), grad_lse=one.expand(q.shape[:3]))
    found = gradients(q, k, v, plan, impl, **known)
    copies = (x.contiguous() for x in (q, k, v))
    expected = gradients(*copies, plan, impl, **{name: x.contiguous() for name, x in known.items()})
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_what_is_not_read_leaves_no_trace(impl: str, device: str):
    """NaN in key blocks that nothing lists, in what reaches rows that read nothing, and behind counts. Some of these
    rows list a block, but one of no tokens."""
    q, k, v, _ = make("odd lengths", torch.float32, 16, device)
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]], device=device)
    plan = BlockPlan.from_mask(mask.bool()[None, None], [0, 32, 48, 64, 77], [0, 32, 64, 64, 96, 97])
    slot = torch.arange(5, device=device)
    dirty = replace(plan, indices=torch.where(slot < plan.counts[..., None], plan.indices, 2**30))
    grad_out, grad_lse = pulls(q)
    clean = gradients(q, k, v, plan, impl, grad_out, grad_lse)
    for x in (grad_out, grad_lse):
        x[:, :, 32:48] = x[:, :, 64:] = torch.nan
    if impl != "reference":  # it multiplies dropped columns by zero in its forward
        v[:, :, 32:64] = torch.nan
    k[:, :, 32:64] = torch.nan
    found = gradients(q, k, v, dirty, impl, grad_out, grad_lse)
    assert all(torch.equal(x, y) for x, y in zip(found, clean, strict=True))
    assert all((found[0][:, :, rows] == 0).all() for rows in (slice(32, 48), slice(64, 77)))
    assert all((x[:, :, 32:64] == 0).all() for x in found[1:])


def test_large_scores_do_not_overflow(impl: str, device: str):
    """Also where the lse lies far below the score of zero that a key past its block's end would have."""
    q, k, v, plan = make("odd lengths", torch.float32, 16, device)
    k = 30 * k.abs()
    q = torch.where(torch.arange(77, device=device)[:, None] % 2 == 0, q * 30, -30 * q.abs())
    grad_out, grad_lse = pulls(q)
    found = gradients(q, k, v, plan, impl, grad_out, grad_lse)
    exact = dense_gradients(q, k, v, plan, grad_out, grad_lse)
    # The last bit of a score of thousands is a part in ten thousand of its weight, so it matters whether the backward
    # adds scores up in the order in which the forward did: some matrix products do and some do not.
    given = block_sparse(q, k, v, plan, layout="bhsd", impl="reference")
    plains = []
    for seed in range(4):
        order = torch.randperm(q.shape[3], generator=torch.Generator().manual_seed(seed)).to(device)
        turned = (q[..., order], k[..., order], v)
        dq, dk, dv = differentiate(
            grad_out, grad_lse, *turned, *given, plan, q.shape[3] ** -0.5, impl="reference"
        )
        plains.append((dq[..., order.argsort()], dk[..., order.argsort()], dv))
    assert_within_low_precision_error(found, plains, exact)
