"""Weights and activations of other types: bf16, fp16, layerwise casting, and quantised weights."""

import pytest
import torch

# Half precision: fp32 sums of rounded numbers in another order; two layers of the tiny models move less than this.
LOW = {"rtol": 5e-2, "atol": 5e-2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype, when):
    family.compare(lambda transformer: transformer.to(dtype), when, dtype=dtype, tolerance=LOW)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_layerwise_casting(family, storage, when):
    def cast(transformer):
        transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        assert any(p.dtype == storage for p in transformer.parameters())

    true = family.compare(cast, when)
    plain = family.run(family.make())
    assert 1e-3 < float((true - plain).norm() / plain.norm()), "the weights were not rounded"


def test_layerwise_casting_computes_in_half_precision(family, when):
    def cast(transformer):
        transformer.to(torch.bfloat16)
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    family.compare(cast, when, dtype=torch.bfloat16, tolerance=LOW)
