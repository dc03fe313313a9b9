"""FLUX's IP-Adapter: its processors have weights of their own, replace those of the dual blocks, and come and go."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

import dit_accel
from dit_accel import SparseProcessor
from dit_accel.errors import UsageError
from dit_accel.testing import tiny_flux_pipeline

CLIP, TEXT, INNER, DUAL = 12, 32, 32, 1
OPTIONS = {"block": 16, "min_tokens": 0, "strict": True}
STEPS = 2


def weights(seed=0):
    """The state dict of a random IP-Adapter, in the format of the released ones."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    projection = {"proj.weight": randn(4 * TEXT, CLIP), "proj.bias": randn(4 * TEXT)}
    projection |= {"norm.weight": 1 + randn(TEXT), "norm.bias": randn(TEXT)}
    layers = {}
    for layer in range(DUAL):
        for name in ("to_k_ip", "to_v_ip"):
            layers |= {f"{layer}.{name}.weight": randn(INNER, TEXT), f"{layer}.{name}.bias": randn(INNER)}
    return {"image_proj": projection, "ip_adapter": layers}


def load(pipe, seed=0):
    pipe.load_ip_adapter(weights(seed), weight_name=None, image_encoder_pretrained_model_name_or_path=None)


def run(pipe, image=True, **changes):
    generator = torch.Generator().manual_seed(5)
    images = {
        name: [torch.randn(1, 1, CLIP, generator=generator)]
        for name in ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    }
    call = {
        "prompt_embeds": torch.randn(1, 19, TEXT, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 24, generator=generator),
        "height": 18,
        "width": 22,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **(images if image else {}),
        **changes,
    }
    return pipe(**call).images


def accelerate(pipe, keep=1.0):
    return dit_accel.accelerate(pipe, None, keep=keep, **OPTIONS)


def close(ours, true):
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)


@pytest.fixture
def stock():
    pipe = tiny_flux_pipeline()
    load(pipe)
    return pipe


def test_loaded_before_and_after(stock, when):
    true, plain = run(stock), run(tiny_flux_pipeline(), image=False)
    assert float((true - plain).norm() / plain.norm()) > 1e-2
    for keep in (1.0, 0.3):
        pipe = tiny_flux_pipeline()
        if when == "before":
            load(pipe)
        with accelerate(pipe, keep) as handle:
            if when == "after":
                load(pipe)
            out = run(pipe)
            report = handle.report()
            assert (report.sparse_calls, report.dense_calls) == (3 * STEPS, 0)
            assert report.cross_attention_calls == DUAL * STEPS, "the image prompt's tokens are read as they were"
        if keep == 1:
            close(out, true)
        else:
            assert float((out - true).norm() / true.norm()) > 1e-3
        processor = pipe.transformer.transformer_blocks[0].attn.processor
        assert type(processor) is FluxIPAdapterAttnProcessor and "_attention_backend" not in vars(processor)
        assert type(pipe.transformer.single_transformer_blocks[0].attn.processor) is FluxAttnProcessor
        close(run(pipe), true)


def test_removal_restores_the_adapters_processor_by_identity(stock):
    before = dict(stock.transformer.attn_processors)
    names = list(stock.transformer.state_dict())
    with accelerate(stock):
        assert list(stock.transformer.state_dict()) == names, "its weights are among the model's"
        accelerate(stock)
        run(stock)
    handle = accelerate(stock)
    handle.remove()
    assert all(stock.transformer.attn_processors[path] is processor for path, processor in before.items())


def test_the_scale_acts_at_once_and_stays(stock, when):
    close_to_none = run(tiny_flux_pipeline(), image=False)
    pipe = tiny_flux_pipeline()
    load(pipe)
    if when == "before":
        pipe.set_ip_adapter_scale(0.5)
    with accelerate(pipe):
        if when == "after":
            pipe.set_ip_adapter_scale(0.5)
        stock.set_ip_adapter_scale(0.5)
        close(run(pipe), run(stock))
        pipe.set_ip_adapter_scale([0.0])
        close(run(pipe), close_to_none)
        pipe.set_ip_adapter_scale(0.5)
    close(run(pipe), run(stock))


def test_unloading_while_installed(when):
    """Loaded before the installation or after it; either way the dual blocks are sparse again without it."""
    pipe = tiny_flux_pipeline()
    plain = run(pipe, image=False)
    if when == "before":
        load(pipe)
    with accelerate(pipe) as handle:
        if when == "after":
            load(pipe)
        with_image = run(pipe)
        pipe.unload_ip_adapter()
        handle.report(clear=True)
        close(run(pipe, image=False), plain)
        report = handle.report(clear=True)
        assert (report.sparse_calls, report.dense_calls, report.cross_attention_calls) == (3 * STEPS, 0, 0)
        load(pipe)
        close(run(pipe), with_image)
        assert handle.report().sparse_calls == 3 * STEPS
        pipe.unload_ip_adapter()
    close(run(pipe, image=False), plain)
    assert type(pipe.transformer.transformer_blocks[0].attn.processor) is FluxAttnProcessor


def test_another_adapter_in_its_place(stock):
    true = run(stock)
    with accelerate(stock):
        run(stock)
        load(stock, seed=1)
        other = run(stock)
        assert not torch.allclose(other, true, atol=1e-3)
    close(run(stock), other)


def test_its_weights_follow_the_model(stock):
    """To another dtype, as to another device."""
    with accelerate(stock) as handle:
        stock.transformer.to(torch.bfloat16)
        processor = stock.transformer.transformer_blocks[0].attn.processor
        assert {p.dtype for p in processor.parameters()} == {torch.bfloat16}
        stock.transformer.to(torch.float32)
        run(stock)
        assert handle.report().dense_calls == 0


def test_the_backend_is_kept(stock):
    with accelerate(stock, 0.3) as handle:
        for backend in ("_native_math", "native"):
            stock.transformer.set_attention_backend(backend)
            run(stock)
        assert handle.report().sparse_calls == 2 * 3 * STEPS
        stock.transformer.set_attention_backend("_native_math")
    backends = {p._attention_backend.value for p in stock.transformer.attn_processors.values()}
    stock.transformer.set_attention_backend("native")
    assert backends == {"_native_math"}


def test_a_deep_copy(stock):
    with accelerate(stock, 0.3) as handle:
        true = run(stock)
        twin = copy.deepcopy(stock)
        with torch.no_grad():
            for parameter in stock.transformer.parameters():
                parameter.zero_()
        assert torch.equal(run(twin), true)
        assert handle.report().sparse_calls == 3 * STEPS
    twin.transformer.single_transformer_blocks[0].attn.processor.remove()
    assert type(twin.transformer.transformer_blocks[0].attn.processor) is FluxIPAdapterAttnProcessor
    assert "_attention_backend" not in vars(twin.transformer.transformer_blocks[0].attn.processor)


def test_through_the_processor_alone(stock):
    """The scale is refused as long as ours stands in its place, which is until the first forward."""
    true = run(stock)
    transformer = stock.transformer
    processor = SparseProcessor(transformer, keep=1.0, **OPTIONS)
    close(run(stock), true)
    assert processor.report.sparse_calls == 0, "constructed, but not set"
    transformer.set_attn_processor(processor)
    with pytest.raises(UsageError, match="IP-Adapter"):
        stock.set_ip_adapter_scale(0.5)
    close(run(stock), true)
    stock.set_ip_adapter_scale(0.5)
    assert not torch.allclose(run(stock), true, atol=1e-3)
    assert processor.report.sparse_calls == 2 * 3 * STEPS and processor.report.dense_calls == 0
    processor.remove()
    transformer.transformer_blocks[0].attn.processor.scale = [1.0]
    close(run(stock), true)


def test_opting_out_is_still_noticed(stock):
    handle = dit_accel.accelerate(stock, None, keep=0.3, block=16, min_tokens=0)
    run(stock)
    stock.transformer.single_transformer_blocks[1].attn.set_processor(FluxAttnProcessor())
    run(stock)
    assert handle.report().fallbacks == {"its processor was replaced after installation": STEPS}
    handle.remove()


def test_with_a_lora(stock, when):
    """Both at once; `scale` of the call is the LoRA's."""
    from peft import LoraConfig

    def add(pipe):
        torch.manual_seed(3)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        pipe.transformer.requires_grad_(False)

    pipe = tiny_flux_pipeline()
    load(pipe)
    add(stock)
    if when == "before":
        add(pipe)
    with accelerate(pipe):
        if when == "after":
            add(pipe)
        close(run(pipe), run(stock))
