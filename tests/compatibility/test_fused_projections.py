"""`fuse_qkv_projections` and back."""

import pytest


def fuse(transformer):
    transformer.fuse_qkv_projections()


def fuse_and_unfuse(transformer):
    transformer.fuse_qkv_projections()
    transformer.unfuse_qkv_projections()


@pytest.mark.parametrize("feature", [fuse, fuse_and_unfuse])
def test_fusing(family, feature, when):
    true = family.compare(feature, when)
    plain = family.run(family.make())
    assert float((true - plain).abs().max()) < 1e-4


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
