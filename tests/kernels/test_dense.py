"""Dense attention: every kernel that runs here against float64, and how one is chosen."""

import pytest
import torch

from dit_accel.errors import KernelUnavailable, UnknownNameError, UsageError
from dit_accel.kernels.dense import IMPLEMENTATIONS, attend, choose, full_plan, why_not
from dit_accel.kernels.dense.api import by_speed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(dtype=torch.float32, tokens=(70, 131), head=64):
    return (torch.randn(2, n, 3, head, device=DEVICE).to(dtype) for n in (tokens[0], tokens[1], tokens[1]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(impl, dtype):
    q, k, v = make(dtype)
    if why_not(impl, q, k, v):
        pytest.skip(why_not(impl, q, k, v))
    exact = attend(q.double(), k.double(), v.double(), scale=0.2, impl="sdpa")
    plain = attend(q, k, v, scale=0.2, impl="sdpa")
    out = attend(q, k, v, scale=0.2, impl=impl)
    assert out.shape == q.shape and out.dtype == dtype
    assert (out - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()


def test_the_formula():
    q, k, v = make(torch.float64)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 64**-0.5).softmax(-1)
    torch.testing.assert_close(attend(q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v))


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU tensors")
def test_choice_on_a_cpu():
    q, k, v = make()
    assert choose(q, k, v) == "sdpa"
    for impl in IMPLEMENTATIONS[:-1]:
        with pytest.raises(KernelUnavailable, match=f"impl='{impl}' cannot run this call: .*CUDA"):
            attend(q, k, v, impl=impl)


def test_the_order_follows_what_was_measured():
    assert by_speed(128, 4096, on_hopper=True)[0] == "hopper"
    assert by_speed(128, 4095, on_hopper=True)[0] == by_speed(64, 32768, on_hopper=True)[0] == "cudnn"
    assert by_speed(64, 512, on_hopper=False)[:2] == (
        "hopper",
        "flash4",
    )  # which say themselves where they run
    assert all(sorted(by_speed(64, 9, hopper)) == sorted(IMPLEMENTATIONS) for hopper in (True, False))


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 5), (128, 129), (300, 512)])
def test_the_full_plan_reads_everything(n_q, n_k):
    plan = full_plan(n_q, n_k, torch.device("cpu"))
    plan.check_values()
    assert plan.to_token_mask().all() and plan.to_token_mask().shape == (1, 1, n_q, n_k)


def test_bad_input_gets_one_clear_error():
    q, k, v = make()
    with pytest.raises(UnknownNameError, match="flash"):
        attend(q, k, v, impl="flsh")
    with pytest.raises(UsageError, match="must agree"):
        attend(q, k, v[:, 1:])
    with pytest.raises(UsageError, match="gradient"):
        attend(q.requires_grad_(), k, v)
