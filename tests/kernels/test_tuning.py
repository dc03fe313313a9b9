"""Tuning: the fastest of the right configurations; wrong and failing ones are told and passed over.

Runs the real kernel where there is a GPU, or in a process started with TRITON_INTERPRET=1 (test_triton.py starts one).
"""

from __future__ import annotations

import os

import pytest
import torch

from dit_accel.errors import KernelUnavailable, UsageError
from dit_accel.kernels.block_sparse import api, block_sparse
from dit_accel.plan import BlockPlan

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETING, reason="needs a GPU or TRITON_INTERPRET=1"
)
triton = pytest.importorskip("dit_accel.kernels.block_sparse.triton", exc_type=ImportError)
tuning = pytest.importorskip("dit_accel.kernels.block_sparse.tuning", exc_type=ImportError)

GOOD, OTHER, FAILING = triton.Config(64, 32, 4, 1), triton.Config(32, 32, 4, 1), triton.Config(48, 32, 4, 1)


def make(head=32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, head, generator=generator).to(DEVICE) for _ in range(3))
    starts = [*range(0, 300, 50), 300]
    mask = torch.rand(1, 2, 6, 6, generator=generator) < 0.6
    return q, k, v, BlockPlan.from_mask(mask.to(DEVICE), starts, starts)


def stopwatch(times):
    """Real calls, given times."""
    times = iter(times)

    def time(run):
        run()
        return next(times)

    return time


def test_triton_takes_the_fastest_that_is_right():
    q, k, v, plan = make()
    found = tuning.tune(q, k, v, plan, configs=[GOOD, FAILING, OTHER], timer=stopwatch([2.0, 1.0]))
    assert found.config == OTHER and [t.config for t in found.trials] == [OTHER, GOOD, FAILING]
    assert [t.milliseconds for t in found.trials] == [1.0, 2.0, None]
    assert found.trials[2].problem
    plain, _ = block_sparse(q, k, v, plan, impl="reference")
    out, _ = block_sparse(q, k, v, plan, impl="triton", config=found.config)
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", ["nan", "scaled", "late"])
def test_triton_never_times_a_wrong_configuration(monkeypatch, wrong):
    q, k, v, plan = make()
    true = triton.block_sparse

    def break_one(*args, config=None, **known):
        out, lse = true(*args, config=config, **known)
        if config == OTHER and wrong == "nan":
            out[0, 1, 7, 3] = torch.nan
        if config == OTHER and wrong == "scaled":
            out *= 1.01
        if config == OTHER and wrong == "late":  # wrong in the last block alone
            out[:, :, -3:] += 0.1
        return out, lse

    monkeypatch.setattr(triton, "block_sparse", break_one)
    found = tuning.tune(q, k, v, plan, configs=[GOOD, OTHER], timer=stopwatch([2.0]))
    assert found.config == GOOD and "the result is" in found.trials[1].problem
    with pytest.raises(KernelUnavailable, match="No configuration .* the result is"):
        tuning.tune(q, k, v, plan, configs=[OTHER], timer=stopwatch([]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [32, 128, 256])
def test_triton_candidates_fit_the_chip(dtype, head):
    some = tuning.candidates(head, dtype, 99 * 1024)
    assert some[0] == triton.config_for(head, dtype) and len(some) == len(set(some)) > 1


def test_triton_configurations_go_to_triton_only():
    q, k, v, plan = make()
    with pytest.raises(UsageError, match="config= is for impl='triton'"):
        api.block_sparse(q, k, v, plan, impl="reference", config=GOOD)
