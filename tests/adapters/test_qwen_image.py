"""What the Qwen-Image adapter says about its tokens, held against the model itself. Text is first, images are odd."""

import pytest
import torch
from joint_models import FULL, ORDERS, assert_a_line, run, sparse

import dit_accel
from dit_accel.adapters import find_adapter, qwen_image
from dit_accel.errors import FallbackError, LayoutError
from dit_accel.methods import load_method
from dit_accel.testing import tiny_qwen_image_inputs, tiny_qwen_image_pipeline, tiny_qwen_image_transformer

# what may be reordered: configurations and further images
REORDERED = {
    "alone": ({}, ()),
    "edit": ({}, ((9, 11),)),
    "layered": ({"use_layer3d_rope": True}, ((9, 11), (9, 11))),
    "2511 alone": ({"zero_cond_t": True}, ()),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("text", "valid"), [(1, None), (19, 19), (32, None)])
@pytest.mark.parametrize(("config", "references"), REORDERED.values(), ids=REORDERED)
def test_keeping_everything_is_stock_diffusers_in_every_order(config, references, order, batch, text, valid):
    """A mask that keeps nothing out (text 19) is no hindrance."""
    transformer = tiny_qwen_image_transformer(**config)
    inputs = tiny_qwen_image_inputs(transformer, references=references, text=text, valid=valid, batch=batch)
    true = run(transformer, inputs)
    processor = sparse(transformer, order=order)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    report = processor.report
    assert report.sparse_calls == 2 and report.dense_calls == 0 and report.keep_achieved == 1
    assert set(report.token_orders) == {order}


@pytest.mark.parametrize("references", [(), ((9, 7),)], ids=["alone", "reference"])
@pytest.mark.parametrize("method", FULL)
def test_keeping_everything_is_stock_diffusers_with_every_method(method, references):
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer, (9, 7), references=references, batch=2)
    true = run(transformer, inputs)
    processor = sparse(transformer, method)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert processor.report.dense_calls == 0


@pytest.mark.parametrize("part", ["pos_embed", "img_in", "proj_out"])
def test_tokens_really_are_reordered(part):
    """Without one of the hooks the result is wrong, so the parity test can tell."""
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer)
    true = run(transformer, inputs)
    sparse(transformer, order="tiles")
    getattr(transformer, part)._forward_hooks.clear()
    assert float((run(transformer, inputs) - true).norm() / true.norm()) > 1e-3  # parity: 1e-7


def test_text_reads_all_and_is_read_by_all():
    """Little is kept of the image and its reference; the text's part of every plan is whole."""
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer, references=((9, 11),))
    engine = sparse(transformer, keep=0.3).engine
    seen = []
    engine.observer = lambda call, layout, q, k, v, plan: seen.append((call, plan.to_token_mask()))
    run(transformer, inputs)
    assert [call.layer for call, _ in seen] == [0, 1]
    for call, mask in seen:
        assert call.segments == (("text", 0, 19), ("video", 19, 217))
        assert mask[..., :19].all() and mask[..., :19, :].all()
        assert 0.1 < mask[..., 19:, 19:].float().mean() < 0.8


def test_a_batch_row_is_the_same_in_other_company():
    transformer = tiny_qwen_image_transformer()
    sparse(transformer, keep=0.3)
    pair, other = (tiny_qwen_image_inputs(transformer, batch=2, seed=seed) for seed in (0, 1))
    mixed = {k: pair[k] if k == "img_shapes" else torch.cat([pair[k][:1], other[k][1:]]) for k in pair}
    first, second = run(transformer, pair), run(transformer, mixed)
    torch.testing.assert_close(second[:1], first[:1], rtol=1e-4, atol=1e-5)
    assert float((second[1:] - first[1:]).norm() / first[1:].norm()) > 1e-2


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
    true = run(transformer, inputs)
    processor = sparse(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert list(processor.report.token_orders) == ["raster: reference tokens are modulated by their place"]


def test_a_controlnet_keeps_the_models_order():
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer)
    # one batch row's shapes as the ControlNet pipelines give them, without a list of images
    inputs["img_shapes"] = [(1, 9, 11)]
    inputs["controlnet_block_samples"] = [torch.randn(1, 99, 32, generator=torch.Generator().manual_seed(3))]
    true = run(transformer, inputs)
    processor = sparse(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert list(processor.report.token_orders) == ["raster: a ControlNet adds its tokens in the model's order"]


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


@pytest.mark.parametrize("method", ["pooled", "lite", "svg2"])
def test_a_pipeline_runs_sparse_again_and_again_and_is_as_it_was_afterwards(method):
    pipe = tiny_qwen_image_pipeline()
    stocks = dict(pipe.transformer.attn_processors)
    true = pipe(**call_of()).images
    options = {"threshold": -0.5} if method == "lite" else {"keep": 0.4}
    with dit_accel.accelerate(pipe, None, method=load_method(method, **options), block=16, min_tokens=0) as handle:
        first = pipe(**call_of()).images
        pipe(**call_of(seed=1, num_images_per_prompt=2))
        again = pipe(**call_of()).images
        report = handle.report()
    assert torch.equal(first, again) and not torch.equal(first, true)
    assert report.runs == 3 and report.sparse_calls == 18 and report.dense_calls == 0 and not report.stateless
    assert all(pipe.transformer.attn_processors[path] is stock for path, stock in stocks.items())
    assert torch.equal(pipe(**call_of()).images, true)


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
