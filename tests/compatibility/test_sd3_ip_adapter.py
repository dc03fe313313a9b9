"""Stable Diffusion 3's IP-Adapter: its processors have weights of their own, and replace all others."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from PIL import Image

import dit_accel
from dit_accel import SparseProcessor
from dit_accel.errors import UsageError
from dit_accel.testing import tiny_sd3_pipeline
from dit_accel.testing.siglip import tiny_siglip

MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
LAYERS, STEPS, IMAGE = 3, 2, 20
OPTIONS = {"block": 16, "min_tokens": 0, "strict": True}
REPLACED = "its processor was replaced after installation"


def make():
    """A pipeline with an image encoder, which an IP-Adapter needs."""
    pipe = tiny_sd3_pipeline(transformer=MEDIUM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        pipe.register_modules(**tiny_siglip(IMAGE))
    return pipe


def load(pipe, seed=3):
    """Load a random IP-Adapter, as diffusers loads one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, 64) for _ in range(LAYERS)]
        projection = IPAdapterTimeImageProjection(
            embed_dim=IMAGE, output_dim=32, hidden_dim=64, heads=1, num_queries=5, timestep_in_dim=32
        )
    weights = {f"{i}.{name}": w for i, module in enumerate(made) for name, w in module.state_dict().items()}
    parts = {"ip_adapter": weights, "image_proj": projection.state_dict()}
    pipe.load_ip_adapter(parts, weight_name=None, image_encoder_folder=None, low_cpu_mem_usage=False)
    pipe.transformer.requires_grad_(False)


def run(pipe, image=True, **changes):
    generator = torch.Generator().manual_seed(5)
    names = {"prompt_embeds": (1, 19, 24), "pooled_prompt_embeds": (1, 20)}
    prompts = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    prompts |= {f"negative_{name}": -x for name, x in prompts.items()}
    call = {"height": 18, "width": 22, "num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 4.0}
    if image:
        gradient = torch.arange(12 * 12 * 3).remainder(251).to(torch.uint8).view(12, 12, 3)
        call["ip_adapter_image"] = Image.fromarray(gradient.numpy())
    return pipe(**prompts, **call, generator=torch.Generator().manual_seed(0), **changes).images


def accelerate(pipe, keep=1.0, **options):
    return dit_accel.accelerate(pipe, None, keep=keep, **{**OPTIONS, **options})


def close(ours, true):
    torch.testing.assert_close(ours, true, rtol=1e-3, atol=1e-4)


def differs(ours, true):
    return float((ours - true).norm() / true.norm()) > 1e-3


def kinds(pipe):
    return {type(p) for p in pipe.transformer.attn_processors.values()}


@pytest.fixture
def stock():
    pipe = make()
    load(pipe)
    return pipe


def test_loaded_before_and_after(stock, when):
    true, plain = run(stock), run(make(), image=False)
    assert differs(true, plain)
    for keep in (1.0, 0.3):
        pipe = make()
        if when == "before":
            load(pipe)
        with accelerate(pipe, keep) as handle:
            if when == "after":
                run(pipe, image=False)
                load(pipe)
                handle.report(clear=True)
            out = run(pipe)
            report = handle.report()
            assert pipe.is_ip_adapter_active
            assert (report.sparse_calls, report.dense_calls) == (LAYERS * STEPS, 0)
            assert report.cross_attention_calls >= LAYERS * STEPS, "the image prompt's tokens are read as they were"
            without = run(pipe, image=False)
        if keep == 1:
            close(out, true)
            close(without, plain)
        else:
            assert differs(out, true)
        assert SD3IPAdapterJointAttnProcessor2_0 in kinds(pipe)
        attn = pipe.transformer.transformer_blocks[0].attn
        assert type(attn.processor) is SD3IPAdapterJointAttnProcessor2_0
        assert "_attention_backend" not in vars(attn.processor)
        close(run(pipe), true)


def test_removal_restores_the_adapters_processor_by_identity(stock):
    before = dict(stock.transformer.attn_processors)
    names = list(stock.transformer.state_dict())
    with accelerate(stock):
        assert list(stock.transformer.state_dict()) == names, "its weights are among the model's"
        handle = accelerate(stock)  # takes over
        run(stock)
        assert list(stock.transformer.state_dict()) == names
    handle.remove()
    assert all(stock.transformer.attn_processors[path] is processor for path, processor in before.items())


def test_the_scale_acts_at_once_and_stays(stock, when):
    plain = run(make(), image=False)
    pipe = make()
    load(pipe)
    if when == "before":
        pipe.set_ip_adapter_scale(0.9)
    with accelerate(pipe):
        if when == "after":
            pipe.set_ip_adapter_scale(0.9)
        half = run(stock)
        stock.set_ip_adapter_scale(0.9)
        assert differs(run(stock), half)
        close(run(pipe), run(stock))
        pipe.set_ip_adapter_scale(0.0)
        close(run(pipe), plain)
        pipe.set_ip_adapter_scale(0.9)
    close(run(pipe), run(stock))


def test_unloading_while_installed(when):
    """Loaded before the installation or after it; either way it is sparse again without it."""
    pipe = make()
    plain = run(pipe, image=False)
    if when == "before":
        load(pipe)
    with accelerate(pipe) as handle:
        if when == "after":
            load(pipe)
        with_image, parts = run(pipe), (pipe.image_encoder, pipe.feature_extractor)
        pipe.unload_ip_adapter()
        handle.report(clear=True)
        close(run(pipe, image=False), plain)
        report = handle.report(clear=True)
        assert (report.sparse_calls, report.dense_calls, report.cross_attention_calls) == (LAYERS * STEPS, 0, 0)
        twin = copy.deepcopy(pipe)
        close(run(twin, image=False), plain)
        pipe.register_modules(image_encoder=parts[0], feature_extractor=parts[1])
        load(pipe)
        close(run(pipe), with_image)
        assert handle.report().sparse_calls == LAYERS * STEPS
        pipe.unload_ip_adapter()
    close(run(pipe, image=False), plain)
    assert kinds(pipe) == {JointAttnProcessor2_0}


def test_opting_out_is_still_noticed(stock):
    """All processors replaced while the adapter stays loaded, or loaded again after opting out."""
    handle = accelerate(stock, 0.3, strict=False)
    run(stock)
    stock.transformer.set_attn_processor(JointAttnProcessor2_0())
    run(stock, image=False)
    assert handle.report().fallbacks == {REPLACED: LAYERS * STEPS}
    stock.transformer.image_proj = None
    load(stock)
    run(stock)
    assert handle.report().fallbacks == {REPLACED: 2 * LAYERS * STEPS}
    handle.remove()
    assert kinds(stock) >= {SD3IPAdapterJointAttnProcessor2_0}


def test_its_weights_follow_the_model(stock):
    """To another dtype, as to another device."""
    with accelerate(stock) as handle:
        stock.transformer.to(torch.bfloat16)
        processor = stock.transformer.transformer_blocks[0].attn.processor
        assert {p.dtype for p in processor.parameters()} == {torch.bfloat16}
        stock.transformer.to(torch.float32)
        run(stock)
        assert handle.report().dense_calls == 0


def test_a_chosen_backend_is_no_more_heeded_than_by_the_stock_processors(stock):
    """They call torch's own attention whatever is chosen, and so do dense calls beside ours."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    try:
        with accelerate(stock, dense_above=0.0) as handle:
            true = run(stock)
            stock.transformer.set_attention_backend("_native_math")
            assert torch.equal(run(stock), true)
            assert dict(handle.report().dense_kernels) == {"diffusers (native)": 2 * LAYERS * STEPS}
        assert not any(hasattr(p, "_attention_backend") for p in stock.transformer.attn_processors.values())
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_a_deep_copy(stock):
    with accelerate(stock, 0.3) as handle:
        true = run(stock)
        twin = copy.deepcopy(stock)
        with torch.no_grad():
            for parameter in stock.transformer.parameters():
                parameter.zero_()
        assert torch.equal(run(twin), true)
        assert handle.report().sparse_calls == LAYERS * STEPS


def test_through_the_processor_alone(stock):
    """Pipelines do not see the adapter before the first forward, which says so."""
    true = run(stock)
    processor = SparseProcessor(stock.transformer, keep=1.0, **OPTIONS)
    stock.transformer.set_attn_processor(processor)
    with pytest.raises(UsageError, match="ip_adapter_image_embeds"):
        run(stock)
    embeds = stock.prepare_ip_adapter_image_embeds(
        ip_adapter_image=Image.new("RGB", (12, 12)), device="cpu", do_classifier_free_guidance=True
    )
    run(stock, image=False, ip_adapter_image_embeds=embeds)
    close(run(stock), true)
    processor.remove()
    assert torch.equal(run(stock), true)
