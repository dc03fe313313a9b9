"""LoRA: loaded, switched off, fused, unfused and unloaded, before and after the installation."""

import inspect

import pytest
import torch
from peft import LoraConfig

NAMES = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj"]


def load(transformer):
    torch.manual_seed(3)  # of the adapter's random weights
    transformer.add_adapter(LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False))
    transformer.requires_grad_(False)


def fuse(transformer):
    load(transformer)
    transformer.fuse_lora()


def unfuse(transformer):
    fuse(transformer)
    transformer.unfuse_lora()


def switch_off(transformer):
    load(transformer)
    transformer.disable_lora()


def unload(transformer):
    load(transformer)
    transformer.unload_lora()


@pytest.mark.parametrize("feature", [load, fuse, unfuse])
def test_an_adapter_that_acts(family, feature, when):
    plain = family.run(family.make())
    true = family.compare(feature, when)
    assert float((true - plain).norm() / plain.norm()) > 1e-2, "the adapter does nothing"


@pytest.mark.parametrize("feature", [switch_off, unload])
def test_an_adapter_that_is_gone(family, feature, when):
    plain = family.run(family.make())
    torch.testing.assert_close(family.compare(feature, when), plain, rtol=1e-5, atol=1e-6)


def test_loading_fusing_and_unloading_while_installed(family):
    """Load, switch off, fuse, unload: each stage equals stock's, and the adapter leaves nothing behind."""
    ours, stock = family.make(), family.make()
    processor = family.install(ours)
    plain = family.run(ours)
    for stage in (
        load,
        lambda transformer: transformer.fuse_lora(),
        lambda transformer: transformer.unfuse_lora(),
        lambda transformer: transformer.unload_lora(),
    ):
        stage(ours), stage(stock)
        torch.testing.assert_close(family.run(ours), family.run(stock), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(family.run(ours), plain, rtol=1e-5, atol=1e-6)
    assert processor.report.dense_calls == 0
    processor.remove()
    assert ours.attn_processors.keys() == stock.attn_processors.keys()


def test_a_strength_given_at_the_call(family):
    """`attention_kwargs={"scale": ...}` is the adapter's, in the forward under way only."""
    ours, stock = family.make(), family.make()
    load(ours), load(stock)
    family.install(ours)
    names = inspect.signature(type(ours).forward).parameters
    name = "attention_kwargs" if "attention_kwargs" in names else "joint_attention_kwargs"
    half, whole = (family.run(stock, **{name: {"scale": scale}}) for scale in (0.5, 1.0))
    assert not torch.allclose(half, whole, atol=1e-3)
    torch.testing.assert_close(family.run(ours, **{name: {"scale": 0.5}}), half, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(family.run(ours), whole, rtol=1e-4, atol=1e-4)
