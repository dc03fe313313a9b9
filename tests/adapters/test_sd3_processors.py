"""SD3's processors, held against the stock ones they stand for: plain, fused, with LoRA and with an IP-Adapter."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from joint_models import run, sparse
from sd3_models import MEDIUM, REORDERED, calls_in, tiny

from dit_accel.errors import UsageError
from dit_accel.testing import tiny_sd3_inputs


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("config", REORDERED.values(), ids=REORDERED)
def test_dense_is_stock_diffusers_bit_for_bit(config, batch):
    transformer = tiny(**config)
    inputs = tiny_sd3_inputs(transformer, batch=batch)
    true = run(transformer, inputs)
    processor = sparse(transformer, dense_above=0.1)
    assert torch.equal(run(transformer, inputs), true)
    report = processor.report
    assert dict(report.dense_reasons) == {"noise level above 0.1": calls_in(config)} and not report.sparse_calls
    assert dict(report.dense_kernels) == {"diffusers (native)": calls_in(config)}


@pytest.mark.parametrize("stock", [PAGJointAttnProcessor2_0, type("Mine", (JointAttnProcessor2_0,), {})])
def test_a_processor_that_is_not_known_is_refused(stock):
    transformer = tiny()
    transformer.set_attn_processor(stock())
    with pytest.raises(UsageError, match=f"has a {stock.__name__}, which does not use"):
        sparse(transformer)
    assert not hasattr(transformer.transformer_blocks[0].attn, "_dit_accel")



@pytest.mark.skipif(torch.__version__ < "2.7", reason="diffusers' dispatcher cannot be one graph with torch 2.6")
def test_each_block_is_one_graph():
    """SD3 names no repeated blocks, so that its blocks are compiled by hand."""
    transformer = tiny(**MEDIUM)
    inputs = tiny_sd3_inputs(transformer)
    true = run(transformer, inputs)
    processor = sparse(transformer, order="tiles")
    torch._dynamo.reset()
    for block in transformer.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert processor.report.sparse_calls == 3 and not processor.report.dense_calls


def fused(**config):
    transformer = tiny(**config)
    transformer.fuse_qkv_projections()
    return transformer


def test_fused_projections_are_stock_diffusers():
    transformer = fused(qk_norm="rms_norm")
    inputs = tiny_sd3_inputs(transformer, batch=2)
    true = run(transformer, inputs)
    sparse(transformer, dense_above=0.1)
    assert torch.equal(run(transformer, inputs), true)
    processor = sparse(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert processor.report.sparse_calls == 2 and not processor.report.dense_calls
    processor.remove()
    attn = transformer.transformer_blocks[0].attn
    assert type(attn.processor) is FusedJointAttnProcessor2_0 and torch.equal(run(transformer, inputs), true)


def test_fusing_afterwards_puts_us_out_and_unfusing_in_again():
    transformer = tiny()
    inputs = tiny_sd3_inputs(transformer)
    processor = sparse(transformer, strict=False)
    run(transformer, inputs)
    transformer.fuse_qkv_projections()
    run(transformer, inputs)
    assert dict(processor.report.fallbacks) == {"its processor was replaced after installation": 2}
    transformer.unfuse_qkv_projections()
    run(transformer, inputs)
    assert processor.report.sparse_calls == 4 and processor.report.dense_calls == 2


def test_fused_projections_of_a_second_attention_are_refused_as_diffusers_own_fail():
    transformer = fused(**MEDIUM)
    inputs = tiny_sd3_inputs(transformer)
    with pytest.raises(AttributeError, match="ndim"):
        run(transformer, inputs)
    sparse(transformer)
    with pytest.raises(UsageError, match="unfuse_qkv_projections"):
        run(transformer, inputs)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_lora(scale):
    from peft import LoraConfig

    transformer = tiny(**MEDIUM)
    inputs = {**tiny_sd3_inputs(transformer), "joint_attention_kwargs": {"scale": scale}}
    bare = run(transformer, inputs)
    names = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    transformer.requires_grad_(False)
    true = run(transformer, inputs)
    assert float((true - bare).norm() / bare.norm()) > 1e-2
    sparse(transformer, dense_above=0.1)
    assert torch.equal(run(transformer, inputs), true)
    processor = sparse(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert processor.report.sparse_calls == 3 and not processor.report.dense_calls


def with_ip_adapter(scale=0.5, **config):
    """A tiny transformer with an IP-Adapter of random weights, loaded as diffusers loads one."""
    transformer = tiny(**config)
    width = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = [SD3IPAdapterJointAttnProcessor2_0(width, width, 16, 64) for _ in transformer.attn_processors]
        projection = IPAdapterTimeImageProjection(
            embed_dim=12, output_dim=width, hidden_dim=64, heads=1, num_queries=5, timestep_in_dim=32
        )
        for weight in (w for module in made for w in module.parameters() if w.ndim == 1):
            torch.nn.init.normal_(weight, 1.0, 0.3)
    weights = {f"{i}.{name}": w for i, module in enumerate(made) for name, w in module.state_dict().items()}
    parts = {"ip_adapter": weights, "image_proj": projection.state_dict()}
    transformer._load_ip_adapter_weights(parts, low_cpu_mem_usage=False)
    for processor in transformer.attn_processors.values():
        processor.scale = scale
    return transformer.eval().requires_grad_(False)


def image_prompt(batch=1):
    embeds = torch.randn(batch, 4, 12, generator=torch.Generator().manual_seed(8))
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": embeds}}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("config", REORDERED.values(), ids=REORDERED)
def test_an_ip_adapter_is_stock_diffusers(config, batch):
    """Its second attention, which has other keys than queries, is left alone."""
    transformer = with_ip_adapter(**config)
    inputs = {**tiny_sd3_inputs(transformer, batch=batch), **image_prompt(batch)}
    true = run(transformer, inputs)
    other = run(transformer, {**inputs, "joint_attention_kwargs": None})
    assert float((true - other).norm() / other.norm()) > 1e-2
    calls = calls_in(config)
    processor = sparse(transformer, dense_above=0.1)
    assert torch.equal(run(transformer, inputs), true)
    assert dict(processor.report.dense_reasons) == {"noise level above 0.1": calls}
    processor = sparse(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    report = processor.report
    assert (report.sparse_calls, report.dense_calls) == (calls, 0)
    assert report.cross_attention_calls == calls + 4, "the image projection has four"


def test_an_ip_adapter_that_got_no_image_in_the_first_forward_says_so():
    """Pipelines do not see the adapter behind a SparseProcessor, and drop `ip_adapter_image`."""
    transformer = with_ip_adapter()
    inputs = tiny_sd3_inputs(transformer)
    true = run(transformer, inputs)
    processor = sparse(transformer)
    with pytest.raises(UsageError, match="ip_adapter_image_embeds=.*unload_ip_adapter"):
        run(transformer, inputs)
    run(transformer, inputs | image_prompt())
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)  # as asked: they see it now
    processor.remove()
    assert torch.equal(run(transformer, inputs), true)
    transformer = with_ip_adapter(scale=0)
    processor = sparse(transformer)  # switched off, it reads no image
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)


def test_a_copy_with_an_ip_adapter_has_weights_of_its_own():
    transformer = with_ip_adapter()
    inputs = {**tiny_sd3_inputs(transformer), **image_prompt()}
    sparse(transformer)
    first = run(transformer, inputs)
    copied = copy.deepcopy(transformer)
    assert torch.equal(run(copied, inputs), first)
    stock = copied.transformer_blocks[0].attn._dit_accel.stock
    stock.to_v_ip.weight.zero_()
    assert float((run(copied, inputs) - first).norm() / first.norm()) > 1e-3
    assert torch.equal(run(transformer, inputs), first)
