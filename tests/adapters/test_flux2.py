"""What the FLUX.2 adapter says about its tokens, held against FLUX.2 itself. Text is first, images are odd grids."""

import pytest
import torch
from joint_models import (
    LITTLE,
    assert_a_line,
    assert_runs_again_and_again,
    assert_text_is_whole,
    assert_the_models_order,
)
from PIL import Image

import dit_accel
from dit_accel.adapters import find_adapter, flux2
from dit_accel.errors import FallbackError, LayoutError
from dit_accel.testing import tiny_flux2_inputs, tiny_flux2_pipeline, tiny_flux2_transformer


def test_text_as_long_as_the_image_keeps_the_models_order():
    transformer = tiny_flux2_transformer()
    inputs = tiny_flux2_inputs(transformer, text=99)
    assert_the_models_order(transformer, inputs, "as many text tokens as image tokens")


@pytest.mark.parametrize("method", ["pooled", "rectified", "sparge", "svg1", "svg2"])
def test_text_reads_all_and_is_read_by_all(method):
    """The image's reference is no part of it."""
    transformer = tiny_flux2_transformer()
    inputs = tiny_flux2_inputs(transformer, references=((9, 11),))
    assert_text_is_whole(transformer, inputs, method, 19, 217, layers=3)


@pytest.mark.parametrize("method", ["pooled", "radial"])
def test_reference_images_of_another_size_are_a_line_with_the_image(method):
    transformer = tiny_flux2_transformer()
    inputs = tiny_flux2_inputs(transformer, (9, 11), references=((9, 11), (5, 14)))
    why = "reference images of another size than the image (9x11, 9x11, 5x14 tokens)"
    assert_a_line(transformer, inputs, why, 3, method)


def test_facts_and_attentions():
    transformer = tiny_flux2_transformer()
    inputs = tiny_flux2_inputs(transformer, (9, 11))
    facts = flux2.read(transformer, inputs)
    assert facts.grid == (1, 9, 11) and facts.timestep == 500 and facts.text == 19 and facts.text_first
    assert facts.condition is inputs["encoder_hidden_states"] and find_adapter(transformer) is flux2
    paths = {f"{path}.processor" for path, _ in flux2.self_attentions(transformer)}
    assert paths == set(transformer.attn_processors), "every attention of the model is in the table"
    for wrong in (None, inputs["img_ids"][..., :3], inputs["img_ids"][:, :5]):
        with pytest.raises(LayoutError, match=r"\[99, 4\]"):
            flux2.read(transformer, {**inputs, "img_ids": wrong})


def call_of(batch=1, seed=0, **more):
    embeddings = torch.randn(batch, 19, 32, generator=torch.Generator().manual_seed(7))
    noise = torch.Generator().manual_seed(seed)
    size = {"height": 72, "width": 88, "num_inference_steps": 3, "output_type": "latent"}
    return {"prompt_embeds": embeddings, **size, "generator": noise, **more}


def picture(width=88, height=72):
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


# and what each needs beside a prompt
VARIANTS = {"Flux2Pipeline": {}, "Flux2KleinPipeline": {"guidance_scale": 1.0}, "Flux2KleinKVPipeline": {}}


@pytest.mark.parametrize("method", LITTLE)
@pytest.mark.parametrize("image", [False, True], ids=["text", "edit"])
def test_a_pipeline_runs_sparse_again_and_again_and_is_as_it_was_afterwards(method, image):
    pipe = tiny_flux2_pipeline()
    given = {"image": picture()} if image else {}

    def sample(**more):
        return pipe(**call_of(**given, **more)).images

    assert_runs_again_and_again(pipe, sample, method, 9, {"seed": 1, "num_images_per_prompt": 2})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pipeline_that_keeps_everything_is_the_stock_one(variant):
    pipe = tiny_flux2_pipeline(variant)
    call = {"output_type": "np", **VARIANTS[variant]}
    true = pipe(**call_of(**call)).images
    with dit_accel.accelerate(pipe, None, keep=1.0, block=16, min_tokens=0, strict=True) as handle:
        found = pipe(**call_of(**call)).images
        assert handle.report().sparse_calls == 9
    assert abs(found - true).max() < 1e-4 and true.std() > 0.01


def test_guidance_with_a_negative_prompt_has_branches():
    pipe = tiny_flux2_pipeline("Flux2KleinPipeline")
    more = {"guidance_scale": 3.0, "negative_prompt_embeds": -call_of()["prompt_embeds"]}
    with dit_accel.accelerate(pipe, None, method="lite", threshold=-0.5, block=16, min_tokens=0) as handle:
        first = pipe(**call_of(**more)).images
        assert torch.equal(pipe(**call_of(**more)).images, first)
        report = handle.report()
    assert report.sparse_calls == 2 * 3 * 3 * 2 and not report.stateless


def test_a_key_value_cache_of_reference_tokens_runs_dense_and_says_so():
    """The first step fills it, the others read it; all of it is one run."""
    pipe = tiny_flux2_pipeline("Flux2KleinKVPipeline")
    true = pipe(**call_of(image=picture())).images
    without = pipe(**call_of()).images
    with dit_accel.accelerate(pipe, None, keep=0.4, block=16, min_tokens=0) as handle:
        assert torch.equal(pipe(**call_of(image=picture())).images, true)
        report = handle.report(clear=True)
        assert dict(report.fallbacks) == {
            "reference tokens fill a key-value cache": 3,
            "keys and values of reference tokens come from a cache": 6,
        }
        assert report.dense_calls == 9 and report.sparse_calls == 0 and report.runs == 1
        assert not torch.equal(pipe(**call_of()).images, without)
        assert handle.report().sparse_calls == 9
    assert float((true - without).norm() / true.norm()) > 1e-3, "the reference matters"
    with (
        dit_accel.accelerate(pipe, None, keep=0.4, block=16, min_tokens=0, strict=True),
        pytest.raises(FallbackError, match="fill a key-value cache"),
    ):
        pipe(**call_of(image=picture()))
