"""What the LTX-Video adapter says about its tokens, held against the model itself. Video tokens alone, odd grids."""

import pytest
import torch
from joint_models import LITTLE, assert_runs_again_and_again, assert_the_models_order
from PIL import Image

import dit_accel
from dit_accel.adapters import find_adapter, ltx
from dit_accel.errors import LayoutError
from dit_accel.testing import tiny_ltx_inputs, tiny_ltx_pipeline, tiny_ltx_transformer


def test_as_many_batch_rows_as_tokens_keep_the_models_order():
    transformer = tiny_ltx_transformer()
    inputs = tiny_ltx_inputs(transformer, (2, 2, 3), batch=12)
    inputs["timestep"] = torch.arange(12.0) * 80
    assert_the_models_order(transformer, inputs, "as many batch rows as tokens", block=8)


def test_facts_and_attentions():
    transformer = tiny_ltx_transformer()
    inputs = tiny_ltx_inputs(transformer)
    facts = ltx.read(transformer, inputs)
    assert facts.grid == (3, 5, 7) and facts.timestep == 500 and facts.text == 0
    assert facts.condition is inputs["encoder_hidden_states"] and find_adapter(transformer) is ltx
    ahead = tiny_ltx_inputs(transformer, coords=True, ahead=2)
    assert ltx.read(transformer, ahead).grid == (5, 5, 7)
    with pytest.raises(
        LayoutError, match=r"105 tokens, but num_frames, height and width of a grid of \(3, 5, 0\)"
    ):
        ltx.read(transformer, {**inputs, "width": None})
    shuffled = torch.rand(1, 3, 105, generator=torch.Generator().manual_seed(0))
    with pytest.raises(LayoutError, match="video_coords of whole frames"):
        ltx.read(transformer, {**inputs, "video_coords": shuffled})


def call_of(seed=0, **more):
    numbers = torch.Generator().manual_seed(7)
    mask = torch.ones(1, 12, dtype=torch.bool)
    prompts = {
        "prompt_embeds": torch.randn(1, 12, 24, generator=numbers),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(1, 12, 24, generator=numbers),
        "negative_prompt_attention_mask": mask,
    }
    size = {"height": 160, "width": 224, "num_frames": 17, "num_inference_steps": 3, "output_type": "latent"}
    return {**prompts, **size, "generator": torch.Generator().manual_seed(seed), **more}


def picture():
    return Image.linear_gradient("L").resize((224, 160)).convert("RGB")


def variants():
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    conditions = [LTXVideoCondition(image=picture()), LTXVideoCondition(image=picture(), frame_index=8)]
    return {
        "LTXPipeline": {},
        "LTXImageToVideoPipeline": {"image": picture()},
        "LTXConditionPipeline": {"conditions": conditions},
    }


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of the scheduler, with conditions
@pytest.mark.parametrize("variant", ["LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"])
def test_a_pipeline_that_keeps_everything_is_the_stock_one(variant):
    pipe, more = tiny_ltx_pipeline(variant), variants()[variant]
    true = pipe(**call_of(**more)).frames
    with dit_accel.accelerate(pipe, None, keep=1.0, block=16, min_tokens=0, strict=True) as handle:
        found = pipe(**call_of(**more)).frames
        report = handle.report()
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
    assert report.sparse_calls == 6 and set(report.token_orders) == {"tiles"}


@pytest.mark.parametrize("method", LITTLE)
def test_a_pipeline_runs_sparse_again_and_again_and_is_as_it_was_afterwards(method):
    pipe = tiny_ltx_pipeline()

    def sample(**more):
        return pipe(**call_of(**more)).frames

    assert_runs_again_and_again(pipe, sample, method, 6, {"seed": 1})
