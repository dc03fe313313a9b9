"""Linear attention against a sum over all pairs of tokens, and its gradients.

The Triton cases run on a GPU, or in a process started with TRITON_INTERPRET=1 (test_triton.py starts one).
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

import dit_accel.kernels.linear_attention.op  # noqa: F401
from dit_accel.errors import KernelUnavailable, UnknownNameError, UsageError
from dit_accel.kernels.linear_attention import FEATURES, bytes_of_all_keys, linear_attention
from dit_accel.plan import BlockPlan, uniform_starts

from .conftest import INTERPRETING

# name: query block lengths, key block lengths, batch, heads, the plan's batch and heads
SHAPES = {
    "even": ((16,) * 3, (16,) * 4, 1, 2, (1, 2)),
    "ragged, shared by heads": ((20, 34, 5), (17, 34, 1, 10), 2, 2, (2, 1)),
    "empty blocks, shared by all": ((0, 20, 0, 9), (5, 0, 30, 0, 0), 2, 2, (1, 1)),
    "one block": ((7,), (50,), 1, 1, (1, 1)),
}
VARIANTS = ["complement", "skipped", "all"]


def make(shape: str, variant: str, device="cpu", dtype=torch.float64, head=16):
    """q, k, v and grad `[B, H, S, D]`, and what of a call is the plan's. One query block reads everything."""
    q_blocks, k_blocks, batch, heads, lead = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape))

    def tensor(tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, head, generator=generator).to(device, dtype)

    n_q, n_k = sum(q_blocks), sum(k_blocks)
    tensors = tensor(n_q), tensor(n_k), tensor(n_k), tensor(n_q)
    mask = torch.rand(*lead, len(q_blocks), len(k_blocks), generator=generator) < 0.5
    mask[..., 1:2, :] = True
    mask[..., 2:, 0] = False
    skipped = torch.rand(1, heads, *mask.shape[2:], generator=generator) < 0.4
    skipped[..., -1, 0] = False  # something is left
    plan = BlockPlan.from_mask(mask.to(device), *([0, *accumulate(x)] for x in (q_blocks, k_blocks)))
    options = {
        "all": {},
        "complement": {"plan": plan},
        "skipped": {"plan": plan, "skipped": skipped.to(device)},
    }
    return tensors, options[variant]


def phi(x: Tensor, feature: str) -> Tensor:
    match feature:
        case "softmax":
            return x.exp() / x.exp().sum(-1, keepdim=True)
        case "elu":
            return torch.where(x > 0, x + 1, x.exp())
        case "relu":
            return torch.where(x > 0, x, 0 * x)


def by_hand(q, k, v, plan=None, skipped=None, feature="softmax", eps=1e-5) -> Tensor:
    """The weights of all pairs of tokens, those that were not read."""
    weights = torch.einsum("bhqd,bhkd->bhqk", phi(q, feature), phi(k, feature))
    if plan is not None:
        weights = weights.masked_fill(plan.to_token_mask(), 0)
    if skipped is not None:
        negligible = BlockPlan.from_mask(skipped, plan.q_starts, plan.k_starts, n_q_tokens=plan.n_q_tokens,
                                         n_k_tokens=plan.n_k_tokens)  # fmt: skip
        weights = weights.masked_fill(negligible.to_token_mask(), 0)
    return weights @ v / (eps + weights.sum(-1, keepdim=True))


def with_gradients(attend, q, k, v, grad) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    given = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*given)
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


def assert_within_low_precision_error(found, plain, exact, dtype) -> None:
    """The error against float64 is at most twice that of the reference in the same type."""
    for name, a, b, true in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
        assert a.dtype == dtype and a.shape == true.shape and a.isfinite().all(), name
        error, allowed = (x.double().sub(true).norm().item() for x in (a, b))
        allowed = 2 * allowed + 4 * torch.finfo(torch.float32).eps * true.norm().item()
        assert error <= allowed, f"{name}: {error:.2e} of {true.norm():.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_sum_over_unread_pairs(shape, variant, feature):
    tensors, options = make(shape, variant)
    found = with_gradients(lambda *a: linear_attention(*a, **options, feature=feature), *tensors)
    true = with_gradients(lambda *a: by_hand(*a, **options, feature=feature), *tensors)
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(linear_attention(*tensors[:3], **options, feature=feature), found[0])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_by_differences(variant, feature):
    (q, k, v, _), options = make("empty blocks, shared by all", variant, head=3)
    some = [x[:, :1].requires_grad_() for x in (q, k, v)]
    options = {n: x[:, :1] if n == "skipped" else x for n, x in options.items()}
    assert torch.autograd.gradcheck(lambda *a: linear_attention(*a, **options, feature=feature), some)


@pytest.mark.parametrize(
    ("shape", "variant", "feature", "dtype", "head"),
    [
        *(("ragged, shared by heads", "complement", feature, torch.float32, 16) for feature in FEATURES),
        *(("ragged, shared by heads", "all", feature, torch.float32, 16) for feature in FEATURES),
        ("ragged, shared by heads", "skipped", "softmax", torch.bfloat16, 16),
        ("even", "skipped", "elu", torch.float16, 64),
        ("even", "all", "softmax", torch.bfloat16, 64),
        ("even", "complement", "softmax", torch.float32, 128),
        ("empty blocks, shared by all", "complement", "softmax", torch.bfloat16, 32),
        ("ragged, shared by heads", "complement", "softmax", torch.bfloat16, 128),
        ("one block", "complement", "relu", torch.float32, 32),
    ],
    ids=str,
)
def test_low_precision(impl, device, shape, variant, feature, dtype, head):
    tensors, options = make(shape, variant, device, dtype, head)
    runs = (
        with_gradients(lambda *a: linear_attention(*a, **options, feature=feature, impl=impl), *tensors),
        with_gradients(
            lambda *a: linear_attention(*a, **options, feature=feature, impl="reference"), *tensors
        ),
        with_gradients(lambda *a: by_hand(*a, **options, feature=feature), *(x.double() for x in tensors)),
    )
    assert_within_low_precision_error(*runs, dtype)


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_a_row_that_reads_everything_gets_nothing(impl, device, eps):
    (q, k, v, grad), options = make("even", "complement", device, torch.float32)
    full = BlockPlan.full(options["plan"].q_starts, options["plan"].k_starts)
    out, *gradients = with_gradients(lambda *a: linear_attention(*a, full, eps=eps, impl=impl), q, k, v, grad)
    assert not any(x.any() for x in (out, *gradients))
    weight, bias = torch.randn(16, 16, device=device), torch.randn(16, device=device)
    projected = linear_attention(q, k, v, full, eps=eps, projection=(weight, bias), impl=impl)
    assert torch.equal(projected, bias.expand_as(projected))


def test_what_was_read_does_not_cancel(impl, device):
    """The read block weighs 1e8 times as much: taking it from a total would leave no digit of the rest."""
    (q, k, v, _), options = make("even", "complement", device, torch.float32)
    mask = torch.zeros(1, 1, 3, 4, dtype=torch.bool, device=device)
    mask[..., 1] = True
    plan = BlockPlan.from_mask(mask, options["plan"].q_starts, options["plan"].k_starts)
    k[:, :, 16:32] *= 1e8
    out = linear_attention(q, k, v, plan, feature="relu", impl=impl)
    true = by_hand(*(x.double() for x in (q, k, v)), plan, feature="relu")
    torch.testing.assert_close(out.double(), true, rtol=1e-4, atol=1e-5)


def test_sums_beyond_float16(impl, device):
    k = torch.full((1, 1, 64, 16), 300.0, dtype=torch.float16, device=device)
    out = linear_attention(
        k, k, k, feature="elu", impl=impl
    )  # 64 x 301 x 300 in a state, and 16 of those in a row
    torch.testing.assert_close(out, k, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("shape", "shared", "variant"),
    [
        ("even", True, "complement"),
        ("even", False, "all"),
        ("ragged, shared by heads", False, "complement"),
        ("ragged, shared by heads", True, "all"),
    ],
)
def test_projected_and_added(impl, device, shape, shared, variant):
    """In blocks of 16 rows the weight multiplies rows, in longer ones states."""
    (q, k, v, before), options = make(shape, variant, device, torch.float32)
    generator = torch.Generator().manual_seed(0)
    lead = () if shared else (2,)
    weight, bias = (torch.randn(*lead, *n, generator=generator).to(device) for n in ((16, 16), (16,)))
    plain = by_hand(*(x.double() for x in (q, k, v)), **options)
    true = plain @ weight.double().mT
    with_bias = true + bias.double().reshape(-1, 1, 16)
    out = linear_attention(q, k, v, **options, projection=(weight, bias), impl=impl)
    torch.testing.assert_close(out.double(), with_bias, rtol=1e-4, atol=1e-5)
    into = before.transpose(1, 2).contiguous()
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    given = linear_attention(
        *turned, **options, projection=(weight, None), into=into, layout="bshd", impl=impl
    )
    assert given.data_ptr() == into.data_ptr() and given.shape == into.shape
    torch.testing.assert_close(into.transpose(1, 2).double(), true + before.double(), rtol=1e-4, atol=1e-5)
    added = linear_attention(q, k, v, **options, into=before.clone(), impl=impl)
    torch.testing.assert_close(added.double(), plain + before.double(), rtol=1e-4, atol=1e-5)


def test_any_strides_and_offsets_of_each_head(impl, device):
    (q, k, v, grad), options = make("ragged, shared by heads", "complement", device, torch.float32)
    plan = options["plan"]
    own = torch.tensor([[[0, 17, 51, 52, 62], [0, 1, 1, 35, 62]]], dtype=torch.int32, device=device)
    plan = BlockPlan(plan.counts, plan.indices, plan.q_starts, own, 59, 62, 34, 34)
    # Neighbours in memory that must not be read: NaN there would show.
    fused = [torch.stack([x, x * torch.nan], 3)[:, :, :, 0] for x in (q, k, v)]
    runs = (
        with_gradients(lambda *a: linear_attention(*a, plan, impl=impl), *fused, grad[:1, :1, :, :1].expand_as(q)),
        with_gradients(lambda *a: by_hand(*a, plan), *(x.double() for x in fused),
                       grad[:1, :1, :, :1].expand_as(q).double()),
    )  # fmt: skip
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    view = linear_attention(*fused, plan, impl=impl)
    torch.testing.assert_close(view, runs[0][0], rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["complement", "all"])
def test_heads_in_turns_change_nothing(impl, device, variant):
    (q, k, v, grad), options = make("ragged, shared by heads", variant, device, torch.float32)

    def run(workspace: int) -> list[Tensor]:
        return with_gradients(
            lambda *a: linear_attention(*a, **options, impl=impl, workspace=workspace), q, k, v, grad
        )

    with pytest.raises(UsageError, match=r"workspace=100 bytes do not hold .* need \d+") as refused:
        run(100)
    least = int(str(refused.value).split("need ")[1].split(".")[0])
    for workspace in (2 * least, 7 * least):  # a head or two at a time: more than that of some backward
        for a, b in zip(run(workspace), run(2**28), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1500, 32), (1, 4, 300, 64)], ids=str)
def test_memory_without_a_plan_is_what_is_told(shape, dtype):
    from dit_accel.testing import peak_bytes

    q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
    projection = torch.eye(shape[-1]), torch.zeros(shape[-1])
    peak, _ = peak_bytes(lambda: linear_attention(q, k, v, projection=projection, impl="reference"))
    taken, told = peak - q.numel() * q.element_size(), bytes_of_all_keys(q, "reference")
    assert 0.8 * told <= taken <= told


def test_as_operators(device):
    (q, k, v, grad), options = make("even", "complement", device, torch.float32)
    calls = (
        lambda q, k, v: linear_attention(q, k, v, **options),
        lambda q, k, v: linear_attention(q, k, v, layout="bshd"),
    )
    for call in calls:
        given = (q, k, v, grad) if call is calls[0] else (q, q, v[:, :, :48], grad)
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
        for a, b in zip(with_gradients(compiled, *given), with_gradients(call, *given), strict=True):
            torch.testing.assert_close(a, b)
    weight, into = torch.randn(16, 16, device=device), grad.clone()

    def add(q, k, v, into):
        return linear_attention(q, k, v, **options, projection=(weight, None), into=into)

    with torch.no_grad():
        true = add(q, k, v, grad.clone())
        torch.compile(add, fullgraph=True, backend="aot_eager", dynamic=False)(q, k, v, into)
    torch.testing.assert_close(into, true)


def test_operators_are_sound():
    (q, k, v, _), options = make("even", "complement", head=4)
    plan = options["plan"]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    fields = ~plan.to_mask(), plan.q_starts, plan.k_starts, 16, 16
    torch.library.opcheck(
        torch.ops.dit_accel.linear_attention,
        (q, k, v, *fields, "elu", 1e-5, 2**28, "reference"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_equal_input_gives_equal_output(impl, device):
    tensors, options = make("ragged, shared by heads", "complement", device, torch.bfloat16)
    runs = [with_gradients(lambda *a: linear_attention(*a, **options, impl=impl), *tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bad_input_gets_one_clear_error():
    (q, k, v, _), options = make("even", "skipped", dtype=torch.float32)
    plan, skipped = options["plan"], options["skipped"]
    other = BlockPlan.full(uniform_starts(47, 16), uniform_starts(64, 16))
    order = torch.arange(64, dtype=torch.int32)[None, None]
    ordered = BlockPlan(
        plan.counts, plan.indices, plan.q_starts, plan.k_starts, 48, 64, 16, 16, k_order=order
    )
    weight = torch.eye(16)
    for match, call in {
        r"Unknown feature 'exp'": lambda: linear_attention(q, k, v, feature="exp"),
        r"Unknown layout": lambda: linear_attention(q, k, v, layout="sbhd"),
        r"implementation 'cuda'": lambda: linear_attention(q, k, v, impl="cuda"),
        r"k and v in everything": lambda: linear_attention(q, k, v[..., 1:]),
        r"v is torch.float64": lambda: linear_attention(q, k, v.double()),
        r"q must have 4 dimensions": lambda: linear_attention(q[0], k, v),
        r"covers 47 query tokens, but there are 48": lambda: linear_attention(q, k, v, other),
        r"no plan with orders": lambda: linear_attention(q, k, v, ordered),
        r"plan's head size is 2; q's is 1": lambda: linear_attention(q[:, :1], k[:, :1], v[:, :1], plan),
        r"skipped= names blocks of a plan": lambda: linear_attention(q, k, v, skipped=skipped),
        r"skipped must be bool \[1\|1, 2\|1, 3, 4\]": lambda: linear_attention(
            q, k, v, plan, skipped=skipped[..., 1:]
        ),
        r"weight must be \(16, 16\) or \(2, 16, 16\)": lambda: linear_attention(
            q, k, v, projection=(weight[1:], None)
        ),
        r"into must be as q": lambda: linear_attention(q, k, v, into=k),
        r"eps=-1 must be at least 0": lambda: linear_attention(q, k, v, eps=-1),
        r"no gradients with projection=": lambda: linear_attention(
            q, k, v, projection=(weight.requires_grad_(), None)
        ),
    }.items():
        with pytest.raises(
            UnknownNameError if "Unknown" in match or "impl" in match else UsageError, match=match
        ):
            call()
    if not (torch.cuda.is_available() or INTERPRETING):
        with pytest.raises(KernelUnavailable, match=r"linear_attention impl='triton' cannot run"):
            linear_attention(q, k, v, impl="triton")
