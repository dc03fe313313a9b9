"""What the LTX-Video adapter says about its tokens, held against the model itself. Video tokens alone, odd grids."""

import pytest
import torch
from joint_models import FULL, ORDERS, run, sparse
from PIL import Image

import dit_accel
from dit_accel.adapters import find_adapter, ltx
from dit_accel.errors import LayoutError
from dit_accel.methods import load_method
from dit_accel.testing import tiny_ltx_inputs, tiny_ltx_pipeline, tiny_ltx_transformer

# what pipelines send: text to video, image to video, and conditions
REORDERED = {
    "grid": {},
    "timestep per token": {"per_token": True},
    "coordinates": {"coords": True},
    "condition ahead": {"coords": True, "ahead": 1, "per_token": True},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", REORDERED.values(), ids=REORDERED)
def test_keeping_everything_is_stock_diffusers_in_every_order(kind, order, batch):
    transformer = tiny_ltx_transformer()
    inputs = tiny_ltx_inputs(transformer, batch=batch, **kind)
    true = run(transformer, inputs)
    processor = sparse(transformer, order=order)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    report = processor.report
    assert report.sparse_calls == 2 and report.dense_calls == 0 and report.keep_achieved == 1
    assert report.cross_attention_calls == 2 and set(report.token_orders) == {order}


@pytest.mark.parametrize("method", FULL)
def test_keeping_everything_is_stock_diffusers_with_every_method(method):
    transformer = tiny_ltx_transformer()
    inputs = tiny_ltx_inputs(transformer, (3, 5, 6), batch=2)
    true = run(transformer, inputs)
    processor = sparse(transformer, method)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert processor.report.dense_calls == 0


@pytest.mark.parametrize("part", ["rope", "proj_in", "time_embed", "proj_out"])
def test_tokens_really_are_reordered(part):
    """Without one of the hooks the result is wrong, so the parity test can tell."""
    transformer = tiny_ltx_transformer()
    inputs = tiny_ltx_inputs(transformer, per_token=True)
    true = run(transformer, inputs)
    sparse(transformer, order="tiles")
    getattr(transformer, part)._forward_hooks.clear()
    assert float((run(transformer, inputs) - true).norm() / true.norm()) > 1e-3  # parity: 1e-7


def test_as_many_batch_rows_as_tokens_keep_the_models_order():
    transformer = tiny_ltx_transformer()
    inputs = tiny_ltx_inputs(transformer, (2, 2, 3), batch=12)
    inputs["timestep"] = torch.arange(12.0) * 80
    true = run(transformer, inputs)
    processor = sparse(transformer, order="tiles", block=8)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert list(processor.report.token_orders) == ["raster: as many batch rows as tokens"]


def test_a_batch_row_is_the_same_in_other_company():
    transformer = tiny_ltx_transformer()
    sparse(transformer, keep=0.3)
    pair, other = (tiny_ltx_inputs(transformer, batch=2, coords=True, seed=seed) for seed in (0, 1))
    mixed = {k: torch.cat([pair[k][:1], other[k][1:]]) for k in pair}
    first, second = run(transformer, pair), run(transformer, mixed)
    torch.testing.assert_close(second[:1], first[:1], rtol=1e-4, atol=1e-5)
    assert float((second[1:] - first[1:]).norm() / first[1:].norm()) > 1e-2


def test_facts_and_attentions():
    transformer = tiny_ltx_transformer()
    inputs = tiny_ltx_inputs(transformer)
    facts = ltx.read(transformer, inputs)
    assert facts.grid == (3, 5, 7) and facts.timestep == 500 and facts.text == 0
    assert facts.condition is inputs["encoder_hidden_states"] and find_adapter(transformer) is ltx
    ahead = tiny_ltx_inputs(transformer, coords=True, ahead=2)
    assert ltx.read(transformer, ahead).grid == (5, 5, 7)
    with pytest.raises(LayoutError, match=r"105 tokens, but num_frames, height and width of a grid of \(3, 5, 0\)"):
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


@pytest.mark.parametrize("method", ["pooled", "lite", "svg2"])
def test_a_pipeline_runs_sparse_again_and_again_and_is_as_it_was_afterwards(method):
    pipe = tiny_ltx_pipeline()
    stocks = dict(pipe.transformer.attn_processors)
    true = pipe(**call_of()).frames
    options = {"threshold": -0.5} if method == "lite" else {"keep": 0.4}
    with dit_accel.accelerate(pipe, None, method=load_method(method, **options), block=16, min_tokens=0) as handle:
        first = pipe(**call_of()).frames
        pipe(**call_of(seed=1))
        again = pipe(**call_of()).frames
        report = handle.report()
    assert torch.equal(first, again) and not torch.equal(first, true)
    assert report.runs == 3 and report.sparse_calls == 18 and report.dense_calls == 0 and not report.stateless
    assert all(pipe.transformer.attn_processors[path] is stock for path, stock in stocks.items())
    assert torch.equal(pipe(**call_of()).frames, true)
