"""sparge's second stage: what the engine hands to the kernel, and what comes of it."""

from __future__ import annotations

import pytest
import torch

import dit_accel
import dit_accel.kernels.block_sparse as kernels
from dit_accel.errors import KernelUnavailable, UsageError
from dit_accel.methods import load_method
from dit_accel.testing import tiny_wan_pipeline

SMALL = dict(method="sparge", keep=0.6, similarity=-1.0, block=16, min_tokens=0)


def sample(pipe, **options):
    """Latents of three steps, the report, and the pv_threshold of each sparse call."""
    seen, attend = [], kernels.block_sparse

    def note(*args, **kwargs):
        seen.append(kwargs.get("pv_threshold"))
        return attend(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, dit_accel.accelerate(pipe, **SMALL, **options) as handle:
        patch.setattr(kernels, "block_sparse", note)
        frames = pipe(
            prompt="a red star moves left",
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=3,
            output_type="latent",
            height=96,
            width=112,
            num_frames=9,
        ).frames
        return frames, handle.report(), seen


def test_the_engine_hands_it_to_the_kernel_and_the_plan_stays():
    pipe = tiny_wan_pipeline()
    plain, plain_report, seen = sample(pipe)
    assert seen and set(seen) == {None}
    low, _, seen = sample(pipe, pv_threshold=-100.0)
    assert set(seen) == {-100.0} and torch.equal(low, plain)
    some, report, seen = sample(pipe, pv_threshold=0.0)
    assert set(seen) == {0.0} and some.isfinite().all() and not torch.equal(some, plain)
    assert report.sparse_calls == plain_report.sparse_calls and not report.fallbacks
    # What is left out is counted as read.
    assert report.keep_achieved == pytest.approx(plain_report.keep_achieved, rel=0.02)


def test_rules_change_it_by_noise_level():
    _, _, seen = sample(tiny_wan_pipeline(), rules=[{"above": 0.9, "pv_threshold": -4.0}])
    assert seen[0] == -4.0 and seen[-1] is None


def test_executors_without_it_are_not_taken():
    with pytest.raises(KernelUnavailable, match="leaves out no tiles"):
        sample(tiny_wan_pipeline(), pv_threshold=-4.0, impl="hopper")


@pytest.mark.parametrize("threshold", [1.0, float("nan")])
def test_a_threshold_above_zero_is_refused(threshold):
    with pytest.raises(UsageError, match="pv_threshold=.* is not possible"):
        load_method("sparge", keep=0.3, pv_threshold=threshold)
