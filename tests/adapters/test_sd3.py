"""What the SD3 adapter says about its tokens, held against the model itself. The image stands first, grids are odd."""

import pytest
import torch
from joint_models import assert_the_models_order, run, sparse
from sd3_models import MEDIUM, tiny

from dit_accel import SparseProcessor
from dit_accel.adapters import find_adapter, sd3
from dit_accel.errors import FallbackError, LayoutError
from dit_accel.testing import tiny_sd3_inputs


def test_latents_that_are_no_whole_number_of_patches():
    transformer = tiny()
    inputs = tiny_sd3_inputs(transformer)
    inputs["hidden_states"] = torch.nn.functional.pad(inputs["hidden_states"], (0, 1, 0, 1))
    true = run(transformer, inputs)
    processor = sparse(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert processor.report.sparse_calls == 2


@pytest.mark.parametrize("method", ["pooled", "rectified", "sparge", "svg1", "svg2"])
def test_text_reads_all_and_is_read_by_all_where_there_is_some(method):
    """Little is kept of the image; the text's part of every plan is whole, and the second attention has none."""
    transformer = tiny(**MEDIUM)
    engine = sparse(transformer, method, keep=0.3).engine
    seen = []
    engine.observer = lambda call, layout, q, k, v, plan: seen.append((call, layout, q, plan.to_token_mask()))
    run(transformer, tiny_sd3_inputs(transformer, text=19))
    assert [(call.layer, layout.text) for call, layout, _, _ in seen] == [(0, 19), (1, 0), (2, 19)]
    for call, layout, query, mask in seen:
        text = (("text", 99, 118),) if layout.text else ()
        assert call.segments == (("video", 0, 99), *text)
        assert query.shape[1] == layout.n_tokens == mask.shape[-1]
        assert mask[..., 99:].all() and mask[..., 99:, :].all()
        assert 0.1 < mask[..., :99, :99].float().mean() < 0.8


def test_the_second_attention_can_stay_dense():
    transformer = tiny(**MEDIUM)
    inputs = tiny_sd3_inputs(transformer)
    true = run(transformer, inputs)
    processor = sparse(transformer, dense_layers=(1,))
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    report = processor.report
    assert dict(report.dense_reasons) == {"dense layer": 1} and set(report.keep_per_layer) == {0, 2}


def test_a_controlnet_keeps_the_models_order():
    transformer = tiny(**MEDIUM)
    inputs = tiny_sd3_inputs(transformer)
    residual = torch.randn(1, 99, 32, generator=torch.Generator().manual_seed(3))
    inputs["block_controlnet_hidden_states"] = [residual]
    assert_the_models_order(transformer, inputs, "a ControlNet adds its tokens in the model's order")


def test_a_subclass_keeps_the_models_order():
    transformer = tiny()
    transformer.__class__ = type("MySD3", (type(transformer),), {})
    processor = sparse(transformer, order="tiles")
    run(transformer, tiny_sd3_inputs(transformer))
    assert list(processor.report.token_orders) == ["raster: reordering is not proven for MySD3"]


@pytest.mark.parametrize("method", ["pooled", "lite"])
def test_skipped_blocks_are_a_branch_of_their_own(method):
    """Also where the conditioning is the same tensor; and they start no new run in its midst."""
    transformer = tiny(num_layers=3, **MEDIUM)
    inputs = tiny_sd3_inputs(transformer)
    options = {"threshold": -0.5} if method == "lite" else {"keep": 0.4}
    skip, pair = {"skip_layers": [1]}, tiny_sd3_inputs(transformer, batch=2)
    true = run(transformer, {**inputs, **skip})
    sparse(transformer, order="tiles")
    torch.testing.assert_close(run(transformer, {**inputs, **skip}), true, rtol=1e-4, atol=1e-5)
    processor = SparseProcessor(transformer, method, block=16, min_tokens=0, strict=True, **options)
    transformer.set_attn_processor(processor)
    seen = []
    processor.engine.observer = lambda call, *_: seen.append((call.run, call.branch, call.step, call.layer))
    for timestep in (900.0, 500.0, 100.0):
        run(transformer, {**pair, "timestep": torch.full((2,), timestep)})
        if timestep < 900:
            run(transformer, {**inputs, **skip, "timestep": torch.full((1,), timestep)})
    whole = [(1, "#0", step, layer) for step in (0, 1, 2) for layer in range(4)]
    without = [(1, "#1", step, layer) for step in (1, 2) for layer in (0, 1, 3)]
    assert sorted(seen) == sorted(whole + without) and not processor.report.stateless


def test_the_same_conditioning_without_blocks_is_another_branch():
    transformer = tiny()
    engine = sparse(transformer).engine
    seen = []
    engine.observer = lambda call, *_: seen.append((call.run, call.branch))
    inputs = tiny_sd3_inputs(transformer)
    for more in ({}, {"skip_layers": [1]}, {"skip_layers": [0]}, {}):
        run(transformer, {**inputs, **more})
    assert seen == [(1, "#0"), (1, "#0"), (1, "#1"), (1, "#2"), (1, "#0"), (1, "#0")]


def test_facts():
    transformer = tiny(**MEDIUM)
    inputs = tiny_sd3_inputs(transformer, (9, 11), text=19, batch=2)
    facts = sd3.read(transformer, {**inputs, "skip_layers": [2, 1]})
    assert facts.grid == (1, 9, 11) and facts.timestep == 500 and facts.text == 19 and not facts.text_first
    assert facts.condition is inputs["encoder_hidden_states"] and find_adapter(transformer) is sd3
    assert facts.variant == "without blocks [1, 2]" and not sd3.read(transformer, inputs).variant
    with pytest.raises(LayoutError, match="at least one patch"):
        sd3.read(transformer, {**inputs, "hidden_states": torch.zeros(1, 4, 8, 1)})


def test_layers_count_attentions_in_order_of_use():
    blocks = "transformer_blocks"
    layers = dict(sd3.self_attentions(tiny(**MEDIUM)))
    assert layers == {f"{blocks}.0.attn": 0, f"{blocks}.0.attn2": 1, f"{blocks}.1.attn": 2}


def test_another_number_of_tokens_runs_dense_and_says_so():
    transformer = tiny()
    engine = sparse(transformer, strict=False).engine
    transformer.context_embedder.register_forward_hook(
        lambda module, args, out: out[:, :7]
    )  # text cut behind us
    inputs = tiny_sd3_inputs(transformer, text=19)
    run(transformer, inputs)
    assert dict(engine.report().fallbacks) == {"106 tokens where the grid has 118": 2}
    sparse(transformer)
    with pytest.raises(FallbackError, match="106 tokens"):
        run(transformer, inputs)
