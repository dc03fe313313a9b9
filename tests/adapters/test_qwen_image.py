"""What the Qwen-Image adapter says about its tokens, held against the model itself. Text is first, images are odd."""

import pytest
import torch
from joint_models import (
    LITTLE,
    assert_a_line,
    assert_runs_again_and_again,
    assert_text_is_whole,
    assert_the_models_order,
    run,
    sparse,
)

import dit_accel
from dit_accel.adapters import find_adapter, qwen_image
from dit_accel.errors import FallbackError, LayoutError
from dit_accel.testing import tiny_qwen_image_inputs, tiny_qwen_image_pipeline, tiny_qwen_image_transformer


def test_text_reads_all_and_is_read_by_all():
    """The image's reference is no part of it."""
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer, references=((9, 11),))
    assert_text_is_whole(transformer, inputs, "pooled", 19, 217, layers=2)


@pytest.mark.parametrize("method", ["pooled", "radial"])
def test_reference_images_of_another_size_are_a_line_with_the_image(method):
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer, batch=2, references=((5, 14),))
    why = "reference images of another size than the image (9x11, 5x14 tokens)"
    assert_a_line(transformer, inputs, why, 2, method)


def test_a_mask_with_holes_runs_dense_and_says_so():
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer, batch=2, valid=(11, 19))
    inputs["encoder_hidden_states_mask"][1, 3] = False
    true = run(transformer, inputs)
    processor = sparse(transformer, strict=False)
    assert torch.equal(run(transformer, inputs), true)
    why = "a mask that keeps out text before other text"
    assert processor.report.sparse_calls == 0 and dict(processor.report.fallbacks) == {why: 2}
    sparse(transformer)
    with pytest.raises(FallbackError, match="would run dense"):
        run(transformer, inputs)


def test_references_modulated_by_place_keep_the_models_order():
    transformer = tiny_qwen_image_transformer(zero_cond_t=True)
    inputs = tiny_qwen_image_inputs(transformer, references=((9, 11),))
    assert_the_models_order(transformer, inputs, "reference tokens are modulated by their place")


def test_a_controlnet_keeps_the_models_order():
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer)
    # one batch row's shapes as the ControlNet pipelines give them, without a list of images
    inputs["img_shapes"] = [(1, 9, 11)]
    inputs["controlnet_block_samples"] = [torch.randn(1, 99, 32, generator=torch.Generator().manual_seed(3))]
    assert_the_models_order(transformer, inputs, "a ControlNet adds its tokens in the model's order")


def test_facts_and_attentions():
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer, (9, 11), valid=19)
    facts = qwen_image.read(transformer, inputs)
    assert facts.grid == (1, 9, 11) and facts.timestep == 500 and facts.text == 19 and facts.text_first
    assert facts.condition is inputs["encoder_hidden_states"] and facts.text_valid == (19,)
    assert find_adapter(transformer) is qwen_image
    paths = {f"{path}.processor" for path, _ in qwen_image.self_attentions(transformer)}
    assert paths == set(transformer.attn_processors), "every attention of the model is in the table"
    for wrong in (None, [], [(1, 9, 12)], [[(99,)]]):
        with pytest.raises(LayoutError, match="99 image tokens"):
            qwen_image.read(transformer, {**inputs, "img_shapes": wrong})


def call_of(batch=1, seed=0, **more):
    embeddings = torch.randn(batch, 19, 32, generator=torch.Generator().manual_seed(7))
    noise = torch.Generator().manual_seed(seed)
    size = {"height": 36, "width": 44, "num_inference_steps": 3, "output_type": "latent"}
    return {"prompt_embeds": embeddings, **size, "generator": noise, **more}


@pytest.mark.parametrize("method", LITTLE)
def test_a_pipeline_runs_sparse_again_and_again_and_is_as_it_was_afterwards(method):
    pipe = tiny_qwen_image_pipeline()

    def sample(**more):
        return pipe(**call_of(**more)).images

    assert_runs_again_and_again(pipe, sample, method, 6, {"seed": 1, "num_images_per_prompt": 2})


def test_guidance_with_a_negative_prompt_has_branches():
    pipe = tiny_qwen_image_pipeline()
    call = {"true_cfg_scale": 3.0, "negative_prompt_embeds": -call_of()["prompt_embeds"], "output_type": "np"}
    true = pipe(**call_of(**call)).images
    with dit_accel.accelerate(pipe, None, keep=1.0, block=16, min_tokens=0, strict=True):
        assert abs(pipe(**call_of(**call)).images - true).max() < 1e-4 and true.std() > 0.01
    with dit_accel.accelerate(pipe, None, method="lite", threshold=-0.5, block=16, min_tokens=0) as handle:
        first = pipe(**call_of(**call)).images
        assert (pipe(**call_of(**call)).images == first).all()
        report = handle.report()
    assert report.sparse_calls == 2 * 2 * 3 * 2 and not report.stateless
