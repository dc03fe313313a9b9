"""Every implementation against float64, on every kind of plan.

The Triton cases run on a GPU, or in a process started with TRITON_INTERPRET=1 (test_triton.py starts one).
"""

from __future__ import annotations

import os
import re
from itertools import accumulate

import pytest
import torch

from dit_accel.errors import KernelUnavailable, UnknownNameError, UsageError
from dit_accel.kernels.block_sparse import block_sparse, choose, why_not
from dit_accel.kernels.block_sparse.even_blocks import why_uneven
from dit_accel.kernels.block_sparse.reference import block_sparse_quantised
from dit_accel.kernels.quantize import quantize_blocks
from dit_accel.plan import BlockPlan, uniform_starts

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETING, reason="needs a GPU or TRITON_INTERPRET=1"
    ),
)
ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors"))
IMPLEMENTATIONS = ["reference", ON_CPU, TRITON]

# name: query block lengths, key block lengths, batch, heads
SHAPES = {
    "one block": ((50,), (50,), 1, 1),
    "odd lengths": ((32, 32, 13), (32, 32, 32, 1), 1, 2),
    "unequal blocks": ((96, 128, 96), (128, 96, 70), 1, 2),
    "zero-length blocks": ((0, 40, 0, 17), (0, 30, 0, 64, 0), 2, 1),
    "few queries many keys": ((20,), (64,) * 4 + (9,), 2, 2),
    "tiny blocks": ((8,) * 5 + (3,), (8,) * 6 + (1,), 1, 1),
}


def make(shape: str, dtype: torch.dtype, head: int, *, plan: str = "random", layout: str = "bshd"):
    """q, k, v in the given layout and a plan: "random", "empty" rows, "broadcast" over heads, or "full"."""
    q_blocks, k_blocks, batch, heads = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape) * 1000 + head)

    def tensor(tokens: int) -> torch.Tensor:
        size = (batch, heads, tokens, head) if layout == "bhsd" else (batch, tokens, heads, head)
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    lead = (1, 1) if plan == "broadcast" else (batch, heads)
    mask = torch.rand(*lead, len(q_blocks), len(k_blocks), generator=generator) < 0.5
    mask[..., 0] |= plan != "empty"  # only "empty" asks for rows without a key
    if plan == "empty":
        mask[..., 0, :] = False
    if plan == "full":
        mask[:] = True
    starts = ([0, *accumulate(q_blocks)], [0, *accumulate(k_blocks)])
    q, k, v = tensor(sum(q_blocks)), tensor(sum(k_blocks)), tensor(sum(k_blocks))
    return q, k, v, BlockPlan.from_mask(mask.to(DEVICE), *starts)


def assert_within_low_precision_error(q, k, v, plan, impl: str, layout: str = "bshd") -> None:
    """The error against float64 is at most twice that of the reference run in the inputs' own type."""
    out, lse = block_sparse(q, k, v, plan, layout=layout, impl=impl)
    plain, plain_lse = block_sparse(q, k, v, plan, layout=layout, impl="reference")
    exact, exact_lse = block_sparse(*(x.double() for x in (q, k, v)), plan, layout=layout, impl="reference")
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == exact_lse.shape and lse.dtype == torch.float32
    assert out.isfinite().all()
    empty = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    rows = empty if layout == "bhsd" else empty.transpose(1, 2)
    assert (out[rows] == 0).all()
    rounding = 4 * torch.finfo(torch.float32).eps
    allowed = 2 * (plain - exact).norm() + rounding * exact.norm()
    assert (out - exact).norm() <= allowed
    seen = ~empty
    gap, plain_gap = ((x[seen] - exact_lse[seen]).norm() for x in (lse, plain_lse))
    assert gap <= 2 * plain_gap + rounding * exact_lse[seen].norm()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, impl: str):
    q, k, v, plan = make(shape, torch.float32, 64)
    assert_within_low_precision_error(q, k, v, plan, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_type_and_head_size(dtype: torch.dtype, head: int, impl: str):
    q, k, v, plan = make("odd lengths", dtype, head, plan="empty")
    assert_within_low_precision_error(q, k, v, plan, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", [8, 96, 256])
def test_unusual_head_sizes(head: int, impl: str):
    q, k, v, plan = make("odd lengths", torch.float32, head)
    assert_within_low_precision_error(q, k, v, plan, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("plan", ["empty", "broadcast", "full"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_every_plan_and_layout(layout: str, plan: str, impl: str):
    q, k, v, plan = make("zero-length blocks", torch.float32, 32, plan=plan, layout=layout)
    assert_within_low_precision_error(q, k, v, plan, impl, layout)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_fused_projection_strides(impl: str):
    """Slices of one [B, S, 3, H, D] tensor give what contiguous copies give."""
    blocks = [0, 30, 70, 81]
    packed = torch.randn(2, 81, 3, 2, 32, device=DEVICE)
    q, k, v = packed.unbind(2)
    plan = BlockPlan.full(blocks, blocks)
    plan = BlockPlan.from_mask(plan.to_mask().to(DEVICE), blocks, blocks)
    out, lse = block_sparse(q, k, v, plan, impl=impl)
    copy, copy_lse = block_sparse(q.contiguous(), k.contiguous(), v.contiguous(), plan, impl=impl)
    assert torch.equal(out, copy) and torch.equal(lse, copy_lse)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_full_plan_is_dense_attention(impl: str):
    q, k, v, plan = make("odd lengths", torch.float32, 64, plan="full", layout="bhsd")
    out, _ = block_sparse(q, k, v, plan, layout="bhsd", impl=impl)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, : k.shape[2]], v)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropped_blocks_are_not_read(impl: str):
    """NaN in every dropped key block, and in the neighbouring head, leaves no trace."""
    q, k, v, _ = make("odd lengths", torch.float32, 32)
    mask = torch.zeros(1, 2, 3, 4, dtype=torch.bool, device=DEVICE)
    mask[0, 0, :, [0, 3]] = True
    plan = BlockPlan.from_mask(mask, [0, 32, 64, 77], [0, 32, 64, 96, 97])
    clean, _ = block_sparse(q, k, v, plan, impl=impl)
    # The reference multiplies dropped columns by zero; only the ones that skip can be asked about v.
    for x in (k, v) if impl != "reference" else (k,):
        x[:, 32:96] = torch.nan
        if impl != "reference":
            x[:, :, 1] = torch.nan
    dirty, _ = block_sparse(q, k, v, plan, impl=impl)
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_halves_merge_by_lse(impl: str):
    """Attention over two halves of the columns, merged by lse, is attention over all of them."""
    q, k, v, plan = make("unequal blocks", torch.float32, 32, plan="full")
    mask = plan.to_mask()
    whole, _ = block_sparse(q, k, v, plan, impl=impl)
    left, right = mask.clone(), mask.clone()
    left[..., 1:] = False
    right[..., :1] = False
    parts = []
    for half in (left, right):
        half = BlockPlan.from_mask(half, plan.q_starts, plan.k_starts)
        parts.append(block_sparse(q, k, v, half, impl=impl))
    lse = torch.stack([lse for _, lse in parts]).softmax(0).transpose(-1, -2)[..., None]
    torch.testing.assert_close(sum(w * out for w, (out, _) in zip(lse, parts, strict=True)), whole)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(impl: str):
    q, k, v, plan = make("odd lengths", torch.float32, 32)
    assert_within_low_precision_error(q * 100, k * 100, v, plan, impl)


def test_cpu_keeps_float64():
    q, k, v, plan = (
        x.double() if isinstance(x, torch.Tensor) else x for x in make("odd lengths", torch.float32, 16)
    )
    if DEVICE != "cpu":
        pytest.skip("needs CPU tensors")
    out, lse = block_sparse(q, k, v, plan, impl="cpu")
    exact, exact_lse = block_sparse(q, k, v, plan, impl="reference")
    torch.testing.assert_close((out, lse), (exact, exact_lse), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors")
def test_cpu_threads_change_neither_result_nor_settings():
    """Also in inference mode, which each thread must enter by itself."""
    q, k, v, plan = make("unequal blocks", torch.float32, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, alone_lse = block_sparse(q, k, v, plan, impl="cpu")
        torch.set_num_threads(3)
        with torch.inference_mode():
            shared, shared_lse = block_sparse(q, k, v, plan, impl="cpu")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, shared) and torch.equal(alone_lse, shared_lse)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors")
def test_cpu_without_onednn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert_within_low_precision_error(*make("unequal blocks", torch.float32, 32), "cpu")


def test_auto_follows_the_device():
    q, k, v, plan = make("one block", torch.float32, 16, layout="bhsd")
    assert choose(q, k, v, plan) == ("triton" if DEVICE == "cuda" else "cpu")


def test_a_named_choice_runs_or_raises():
    q, k, v, plan = make("one block", torch.float64, 16, layout="bhsd")
    assert why_not("reference", q, k, v, plan) is None
    assert why_not("triton", q, k, v, plan)
    with pytest.raises(KernelUnavailable, match="impl='triton' cannot run this call"):
        block_sparse(q, k, v, plan, layout="bhsd", impl="triton")
    with pytest.raises(UnknownNameError, match="Did you mean 'triton'"):
        block_sparse(q, k, v, plan, layout="bhsd", impl="tritn")


def test_gradients_are_refused():
    q, k, v, plan = make("one block", torch.float32, 16)
    q.requires_grad_()
    with pytest.raises(UsageError, match="requires a gradient"):
        block_sparse(q, k, v, plan)
    with torch.no_grad():
        block_sparse(q, k, v, plan)


@pytest.mark.parametrize(
    ("dtype", "head", "block", "said"),
    [
        (torch.float32, 64, 128, "takes float16 and bfloat16, not torch.float32"),
        (torch.bfloat16, 96, 128, "head size 96 is not one of 64, 128"),
        (torch.bfloat16, 64, 200, "key blocks of up to 200 tokens are longer than 128"),
        (torch.bfloat16, 64, 128, "runs on CUDA devices|not a Hopper GPU|^$"),
    ],
)
def test_the_hopper_kernel_says_what_it_cannot_take(dtype, head: int, block: int, said: str):
    pytest.importorskip("triton")
    x = torch.zeros(1, 2, 300, head, dtype=dtype, device=DEVICE)
    plan = BlockPlan.full(uniform_starts(300, block, DEVICE), uniform_starts(300, block, DEVICE))
    reason = why_not("hopper", x, x, x, plan)
    assert re.search(said, reason or "")
    if reason:
        with pytest.raises(KernelUnavailable, match="impl='hopper'"):
            block_sparse(x, x, x, plan, layout="bhsd", impl="hopper")


def test_misfits_are_refused():
    q, k, v, plan = make("one block", torch.float32, 16)
    with pytest.raises(UsageError, match="covers 50 query tokens, but there are 49"):
        block_sparse(q[:, :49], k, v, plan)
    with pytest.raises(UsageError, match="must agree"):
        block_sparse(q, k[..., :8], v, plan)
    with pytest.raises(UsageError, match="make them alike"):
        block_sparse(q, k.double(), v, plan)
    with pytest.raises(UnknownNameError, match="layout"):
        block_sparse(q, k, v, plan, layout="sbhd")
    wide = BlockPlan.from_mask(
        torch.ones(1, 3, 1, 1, dtype=torch.bool, device=DEVICE),
        uniform_starts(50, 50, DEVICE),
        uniform_starts(50, 50, DEVICE),
    )
    with pytest.raises(UsageError, match="head size is 3; q's is 1"):
        block_sparse(q, k, v, wide)


@pytest.mark.parametrize("precision", ["int8_fp8", "fp8", "int8"])
def test_quantised_precision(precision):
    """Close to full precision, at either layout, with a negative scale, and refused where nothing can run it."""
    q, k, v = (torch.randn(1, 300, 2, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    starts = [0, 128, 256, 300]
    plan = BlockPlan.from_mask(
        torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0]]).bool()[None, None], starts, starts
    )
    for scale in (None, -0.1):
        exact, exact_lse = block_sparse(q, k, v, plan, scale=scale)
        out, lse = block_sparse(q, k, v, plan, scale=scale, precision=precision)
        assert (out - exact).norm() < 0.06 * exact.norm() and torch.equal(
            lse.isneginf(), exact_lse.isneginf()
        )
        assert (lse - exact_lse).nan_to_num(0.0).abs().max() < 0.1
    with pytest.raises(KernelUnavailable, match="runs on reference, hopper"):
        block_sparse(q, k, v, plan, precision=precision, impl="cpu")
    with pytest.raises(UnknownNameError, match="int8_fp8"):
        block_sparse(q, k, v, plan, precision="int4")


@pytest.mark.parametrize("impl", ["reference", TRITON])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_scores(dtype, shape, impl):
    """Against the formula's emulation from the same copies, and float64; keys share a direction, as real ones do."""
    q, k, v, plan = make(shape, dtype, 64, plan="empty", layout="bhsd")
    k = k + 2 * torch.randn(1, k.shape[1], 1, 64, generator=torch.Generator().manual_seed(0)).to(k)
    known = dict(layout="bhsd", precision="int8")
    out, lse = block_sparse(q, k, v, plan, impl=impl, **known)
    copies = quantize_blocks(q, k, v, plan, "int8", impl="reference")
    emulated, emulated_lse = block_sparse_quantised(copies, plan, 64**-0.5, q)
    exact, exact_lse = block_sparse(*(x.double() for x in (q, k, v)), plan, layout="bhsd", impl="reference")
    assert torch.equal(lse.isneginf(), exact_lse.isneginf()) and out.isfinite().all()
    assert (out.double() - exact).norm() <= 1.1 * (emulated.double() - exact).norm()
    assert (lse - emulated_lse).nan_to_num(0.0).abs().max() < 1e-3
    assert (out.double() - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("impl", ["flash4", "flex"])
def test_executors_of_other_packages_say_why_not(impl):
    q = torch.zeros(1, 128, 1, 64)
    with pytest.raises(
        KernelUnavailable, match=rf"impl='{impl}' cannot run this call: the tensors are on cpu"
    ):
        block_sparse(q, q, q, BlockPlan.full([0, 128], [0, 128]), impl=impl)


@pytest.mark.parametrize(
    "q_starts, k_starts, side",
    [
        ([0, 128, 200], [0, 128, 256], None),
        ([0, 100, 128], [0, 128], "query"),
        ([0, 128], [0, 64, 128], "key"),
        ([0, 128], [0, 60], "key"),
    ],
)
def test_blocks_of_one_size_are_recognised(q_starts, k_starts, side):
    reason = why_uneven(BlockPlan.full(q_starts, k_starts))
    assert reason is None if side is None else f"{side} blocks of 128 tokens" in reason
