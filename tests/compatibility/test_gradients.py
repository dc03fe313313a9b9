"""Training: forwards that need gradients run dense, are counted, and give stock's gradients, checkpointed or not."""

import pytest
import torch

from dit_accel.errors import FallbackError

REASON = "gradients are needed, and the sparse kernels have no backward"


def gradients(family, transformer, inputs):
    transformer.zero_grad()
    transformer(**inputs, return_dict=False)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_stock(family, checkpointing, when):
    transformer = family.make().train().requires_grad_(True)
    inputs = family.inputs(transformer)
    true = gradients(family, transformer, inputs)
    if checkpointing and when == "before":
        transformer.enable_gradient_checkpointing()
    processor = family.install(transformer, 0.3, strict=False)
    if checkpointing and when == "after":
        transformer.enable_gradient_checkpointing()
    ours = gradients(family, transformer, inputs)
    assert true.keys() == ours.keys() and true
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, true[name], rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    layers = len([seat for seat in processor.engine.seating.seats if seat.layer is not None])
    report = processor.report
    assert (report.sparse_calls, report.dense_reasons) == (0, {REASON: layers}), "the second forward is no call more"
    with torch.no_grad():  # validation between training steps
        transformer(**inputs)
    assert processor.report.sparse_calls == layers


def test_strict_refuses_them(family):
    transformer = family.make().requires_grad_(True)
    processor = family.install(transformer, 0.3)
    with pytest.raises(FallbackError, match="gradients are needed"):
        transformer(**family.inputs(transformer))
    processor.remove()


def test_an_adapter_can_be_trained_and_then_run_sparse(family):
    from peft import LoraConfig

    transformer = family.make()
    torch.manual_seed(3)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    inputs = family.inputs(transformer)
    true = gradients(family, transformer, inputs)
    processor = family.install(transformer, 0.3, strict=False)
    for name, gradient in gradients(family, transformer, inputs).items():
        torch.testing.assert_close(gradient, true[name], rtol=1e-4, atol=1e-7)
    assert all("lora" in name for name in true) and processor.report.sparse_calls == 0
    family.run(transformer)
    assert processor.report.sparse_calls > 0
