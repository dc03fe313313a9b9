"""What is Stable Diffusion 3's own about IP-Adapters: they replace all processors, which take no backend."""

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from ip_adapters import OPTIONS, REPLACED, SD3, STEPS, accelerate, kinds
from PIL import Image

from dit_accel import SparseProcessor
from dit_accel.errors import UsageError

run = SD3.run
CALLS = SD3.layers * STEPS


@pytest.fixture
def stock():
    return SD3.loaded()


def test_a_run_without_an_image_prompt(stock):
    """FLUX's pipeline has none while its adapter is loaded."""
    plain = run(SD3.make(), image=False)
    with accelerate(stock):
        run(stock)
        assert stock.is_ip_adapter_active, "the pipeline sees it all the while"
        SD3.close(run(stock, image=False), plain)


def test_opting_out_is_still_noticed(stock):
    """All processors replaced while the adapter stays loaded, or loaded again after opting out."""
    handle = accelerate(stock, 0.3, strict=False)
    run(stock)
    stock.transformer.set_attn_processor(JointAttnProcessor2_0())
    run(stock, image=False)
    assert handle.report().fallbacks == {REPLACED: CALLS}
    stock.transformer.image_proj = None
    SD3.load(stock)
    run(stock)
    assert handle.report().fallbacks == {REPLACED: 2 * CALLS}
    handle.remove()
    assert kinds(stock) >= {SD3IPAdapterJointAttnProcessor2_0}


def test_setting_the_adapters_own_processors_again_is_opting_out(stock):
    before = dict(stock.transformer.attn_processors)
    handle = accelerate(stock, 0.3, strict=False)
    run(stock)
    stock.transformer.set_attn_processor(before)
    run(stock)
    assert handle.report().fallbacks == {REPLACED: CALLS}
    handle.remove()


def test_a_chosen_backend_is_no_more_heeded_than_by_the_stock_processors(stock):
    """They call torch's own attention whatever is chosen, and so do dense calls beside ours."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    try:
        with accelerate(stock, dense_above=0.0) as handle:
            true = run(stock)
            stock.transformer.set_attention_backend("_native_math")
            assert torch.equal(run(stock), true)
            assert dict(handle.report().dense_kernels) == {"diffusers (native)": 2 * CALLS}
        assert not any(hasattr(p, "_attention_backend") for p in stock.transformer.attn_processors.values())
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


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
    SD3.close(run(stock), true)
    processor.remove()
    assert torch.equal(run(stock), true)
