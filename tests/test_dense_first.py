"""`dense_first`: a share of the steps, whatever noise level the size of an image gives them."""

import pytest
import torch

import dit_accel
from dit_accel.errors import UsageError
from dit_accel.options import SparseOptions
from dit_accel.testing import tiny_flux_with_text

SPARSE = {"keep": 0.5, "block": 16, "min_tokens": 0}


SHARES = [(0.1, 30, 3), (0.1, 28, 3), (0.1, 4, 1), (0.0, 9, 0), (1.0, 9, 9)]


@pytest.mark.parametrize(("share", "steps", "first"), SHARES)
def test_a_share_is_rounded_up(share, steps, first):
    assert SparseOptions(dense_first=share).n_dense_first(steps) == first


@pytest.mark.parametrize("size", [64, 128])
def test_as_many_steps_at_every_size(size):
    pipe = tiny_flux_with_text(guidance_embeds=True)
    pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": size, "width": size, "num_inference_steps": 5, "max_sequence_length": 16, "output_type": "latent"}
    with dit_accel.accelerate(pipe, dense_first=0.25, **SPARSE) as handle:
        for _ in range(2):  # each run begins anew
            pipe("a star", generator=torch.Generator().manual_seed(0), **call)
        report = handle.report()
    layers = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    assert report.dense_reasons == {"one of the first 0.25 of the steps": 2 * 2 * layers}
    assert report.sparse_calls == 2 * 3 * layers and not report.fallbacks


def test_it_needs_a_pipeline():
    with pytest.raises(UsageError, match="Give `accelerate` the pipeline, or use dense_above"):
        dit_accel.accelerate(tiny_flux_with_text().transformer, dense_first=0.1, **SPARSE)


@pytest.mark.parametrize("share", [-0.1, 1.5, "a"])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(UsageError, match="a share of the steps from 0 to 1"):
        SparseOptions(dense_first=share)
