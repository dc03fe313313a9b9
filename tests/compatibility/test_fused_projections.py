"""`fuse_qkv_projections` and back."""

import pytest
import torch

from dit_accel import SparseProcessor
from dit_accel.errors import FallbackError
from dit_accel.testing import tiny_sd3_inputs, tiny_sd3_transformer


def fuse(transformer):
    transformer.fuse_qkv_projections()


def fuse_and_unfuse(transformer):
    transformer.fuse_qkv_projections()
    transformer.unfuse_qkv_projections()


@pytest.mark.parametrize("feature", [fuse, fuse_and_unfuse])
def test_fusing(family, feature, when):
    if family.name == "sd3" and feature is fuse and when == "after":
        pytest.skip("diffusers then sets processors of its own: below")
    true = family.compare(feature, when)
    plain = family.run(family.make())
    assert float((true - plain).abs().max()) < 1e-4


@torch.no_grad()
def test_where_fusing_sets_other_processors_it_is_told():
    """Stable Diffusion 3: diffusers sets processors of its own when it fuses."""
    transformer = tiny_sd3_transformer()
    inputs = tiny_sd3_inputs(transformer)

    def install():
        processor = SparseProcessor(transformer, keep=1.0, block=16, min_tokens=0, strict=True)
        transformer.set_attn_processor(processor)
        return processor

    install()
    true = transformer(**inputs).sample
    fuse(transformer)
    with pytest.raises(FallbackError, match="replaced"):
        transformer(**inputs)
    processor = install()
    torch.testing.assert_close(transformer(**inputs).sample, true, rtol=1e-4, atol=1e-4)
    assert processor.report.sparse_calls == 2 and processor.report.dense_calls == 0


def test_fusing_while_installed(family):
    if family.name == "sd3":
        pytest.skip("diffusers then sets processors of its own: above")
    transformer = family.make()
    plain = family.run(transformer)
    processor = family.install(transformer)
    for step in (fuse, lambda t: t.unfuse_qkv_projections()):
        step(transformer)
        assert float((family.run(transformer) - plain).abs().max()) < 1e-4
    processor.remove()
    assert float((family.run(transformer) - plain).abs().max()) < 1e-6
    assert processor.report.dense_calls == 0
