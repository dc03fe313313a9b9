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


def compare(family, feature, when):
    """Ours with stock, and stock fused with stock plain."""
    true, plain = family.compare(feature, when), family.run(family.make())
    assert float((true - plain).abs().max()) < 1e-4


FEATURES = [(fuse, "before"), (fuse_and_unfuse, "before"), (fuse_and_unfuse, "after")]


@pytest.mark.parametrize(("feature", "when"), FEATURES)
def test_fusing(family, feature, when):
    compare(family, feature, when)


@pytest.mark.of("wan", "flux", "hunyuan-video", "hunyuan-video15", "flux2")
def test_fusing_after_installation(family):
    compare(family, fuse, "after")


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


@pytest.mark.of("wan", "flux", "hunyuan-video", "hunyuan-video15", "flux2")  # Stable Diffusion 3: above
def test_fusing_while_installed(family):
    transformer = family.make()
    plain = family.run(transformer)
    processor = family.install(transformer)
    for step in (fuse, lambda t: t.unfuse_qkv_projections()):
        step(transformer)
        assert float((family.run(transformer) - plain).abs().max()) < 1e-4
    processor.remove()
    assert float((family.run(transformer) - plain).abs().max()) < 1e-6
    assert processor.report.dense_calls == 0
