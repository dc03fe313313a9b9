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


def quantise_int8(transformer):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(transformer, Int8WeightOnlyConfig())


def quantise_int8_dynamic(transformer):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(transformer, Int8DynamicActivationInt8WeightConfig())


def quantise_fp8(transformer):
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(transformer, Float8WeightOnlyConfig())


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int8_dynamic, quantise_fp8])
def test_torchao(family, quantise, when):
    pytest.importorskip("torchao")
    # With quantised activations a small difference may round to another integer.
    tolerance = LOW if quantise is quantise_int8_dynamic else {"rtol": 1e-4, "atol": 1e-4}
    true = family.compare(quantise, when, tolerance=tolerance)
    plain = family.run(family.make())
    assert 1e-4 < float((true - plain).norm() / plain.norm()) < 0.5, "the weights were not rounded"


def test_bitsandbytes_8_bit(family, when):
    """Linear layers whose forward is bitsandbytes' own, on the CPU."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantise(transformer):
        for path, module in list(transformer.named_modules()):
            if type(module) is torch.nn.Linear and path.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
                linear = bnb.nn.Linear8bitLt(
                    module.in_features, module.out_features, module.bias is not None, has_fp16_weights=False
                )
                linear.load_state_dict(module.state_dict())
                transformer.set_submodule(path, linear.to("cpu"))

    family.compare(quantise, when, tolerance=LOW)
