"""What the FLUX adapter says about FLUX's tokens, held against FLUX itself. Text stands first, images are odd grids."""

import pytest
import torch
from joint_models import (
    LITTLE,
    NEEDS_GRID,
    ORDERS,
    assert_a_line,
    assert_runs_again_and_again,
    assert_text_is_whole,
    assert_the_models_order,
    run,
    sparse,
)

import dit_accel
from dit_accel.adapters import find_adapter, flux
from dit_accel.errors import LayoutError
from dit_accel.testing import tiny_flux_inputs, tiny_flux_pipeline, tiny_flux_transformer


@pytest.mark.parametrize("method", ["pooled", "rectified", "sparge", "svg1", "svg2"])
def test_text_reads_all_and_is_read_by_all(method):
    transformer = tiny_flux_transformer()
    assert_text_is_whole(transformer, tiny_flux_inputs(transformer, text=19), method, 19, 118, layers=3)


def kontext_inputs(transformer, size):
    """An image's 9 x 11 tokens, and behind them a reference's."""
    inputs = tiny_flux_inputs(transformer, (9, 11))
    reference = tiny_flux_inputs(transformer, size, seed=1)
    reference["img_ids"][:, 0] = 1
    for name, dim in (("hidden_states", 1), ("img_ids", 0)):
        inputs[name] = torch.cat([inputs[name], reference[name]], dim)
    return inputs


@pytest.mark.parametrize("method", ["pooled", *NEEDS_GRID])
def test_kontexts_reference_tokens_of_another_size_are_a_line_with_the_images(method):
    transformer = tiny_flux_transformer()
    why = "reference images of another size than the image (9x11, 5x14 tokens)"
    assert_a_line(transformer, kontext_inputs(transformer, (5, 14)), why, 3, method)


@pytest.mark.parametrize("order", ORDERS)
def test_kontexts_reference_tokens_of_the_same_size_are_a_second_frame(order):
    transformer = tiny_flux_transformer()
    inputs = kontext_inputs(transformer, (9, 11))
    assert flux.read(transformer, inputs).grid == (2, 9, 11)
    true = run(transformer, inputs)
    processor = sparse(transformer, order=order)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert set(processor.report.token_orders) == {order} and processor.report.sparse_calls == 3


def test_places_in_disorder_are_a_line():
    transformer = tiny_flux_transformer()
    inputs = tiny_flux_inputs(transformer, (9, 11))
    inputs["img_ids"] = inputs["img_ids"].roll(3, 0)
    facts = flux.read(transformer, inputs)
    assert facts.grid == (1, 1, 99) and facts.loose == "places that are not row by row"
    assert flux.read(transformer, inputs | {"img_ids": torch.randn(99, 3)}).grid == (1, 1, 99)


def test_a_controlnet_keeps_the_models_order():
    transformer = tiny_flux_transformer()
    inputs = tiny_flux_inputs(transformer)
    inputs["controlnet_block_samples"] = [torch.randn(1, 99, 32, generator=torch.Generator().manual_seed(3))]
    assert_the_models_order(transformer, inputs, "a ControlNet adds its tokens in the model's order")


def test_facts():
    transformer = tiny_flux_transformer()
    inputs = tiny_flux_inputs(transformer, (9, 11), text=19)
    facts = flux.read(transformer, inputs)
    assert facts.grid == (1, 9, 11) and facts.timestep == 500 and facts.text == 19 and facts.text_first
    assert facts.condition is inputs["encoder_hidden_states"] and find_adapter(transformer) is flux
    with pytest.raises(LayoutError, match=r"\[99, 3\]"):
        flux.read(transformer, {**inputs, "img_ids": inputs["img_ids"][:5]})


def call_of(batch=1, seed=0, **more):
    generator = torch.Generator().manual_seed(7)
    embeddings = {
        "prompt_embeds": torch.randn(batch, 19, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, 24, generator=generator),
    }
    noise = torch.Generator().manual_seed(seed)
    size = {"height": 18, "width": 22, "num_inference_steps": 3, "output_type": "latent"}
    return {**embeddings, **size, "generator": noise, **more}


@pytest.mark.parametrize("method", LITTLE)
def test_a_pipeline_runs_sparse_again_and_again_and_is_as_it_was_afterwards(method):
    pipe = tiny_flux_pipeline()

    def sample(**more):
        return pipe(**call_of(**more)).images

    assert_runs_again_and_again(pipe, sample, method, 9, {"seed": 1, "num_images_per_prompt": 2})


def test_guidance_with_a_negative_prompt_has_branches():
    pipe = tiny_flux_pipeline()
    other = {f"negative_{k}": -v for k, v in call_of().items() if k.endswith("embeds")}
    with dit_accel.accelerate(pipe, None, method="lite", threshold=-0.5, block=16, min_tokens=0) as handle:
        first = pipe(**call_of(true_cfg_scale=3.0, **other)).images
        assert torch.equal(pipe(**call_of(true_cfg_scale=3.0, **other)).images, first)
        report = handle.report()
    assert report.sparse_calls == 2 * 3 * 3 * 2 and not report.stateless
