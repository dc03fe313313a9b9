"""A step cache and sparse attention on one transformer: what is skipped, counted and kept in order."""

from __future__ import annotations

import pytest
import torch
from stepping import Model, accelerate, sample

import dit_accel
from dit_accel.errors import FallbackError
from dit_accel.testing import (
    tiny_qwen_image_inputs,
    tiny_qwen_image_transformer,
    tiny_wan_pipeline,
)


@pytest.mark.parametrize(("name", "ordered"), [("easy", 14), ("tokens", 24)])
def test_sparse_attention_beside_a_cache_does_not_advance_on_skipped_steps(name, ordered):
    """A forward of which some rows are computed still brings its tokens into the order of those that are kept."""
    pipe = tiny_wan_pipeline()
    sparse = {"method": "svg2", "keep": 0.4, "min_tokens": 0, "block": 16}
    handle = dit_accel.accelerate(pipe, cache={"name": name, "schedule": "110101010101"}, **sparse)
    sample(pipe)
    report = handle.report()
    layers = len(pipe.transformer.blocks)
    assert report.forwards == {"computed": 14, "reused": 10}
    assert report.sparse_calls == 14 * layers and report.plans == {"predicted": 14 * layers}
    assert sum(report.token_orders.values()) == ordered


def test_dense_calls_of_a_forward_that_is_made_up_are_not_counted():
    """Calls that never reach sparse attention are counted as the forward begins: only if it is then computed."""
    model = Model()
    stock = model.transformer.blocks[0].attn1.processor
    cache = {"name": "easy", "schedule": "11010", "min_steps": 0}
    handle = accelerate(model, cache, method="pooled", keep=0.5, min_tokens=0, block=16)
    model.transformer.blocks[0].attn1.set_processor(stock)
    for time in (900, 800, 700, 600, 500):
        model("cond", time)
    report = handle.report()
    assert report.forwards == {"computed": 3, "reused": 2}
    assert (
        report.fallbacks == {"its processor was replaced after installation": 3} and report.dense_calls == 3
    )
    assert report.sparse_calls == 3 * (len(model.transformer.blocks) - 1)


@pytest.mark.parametrize("name", ["easy", "latent"])
def test_a_reason_of_the_model_is_counted_only_for_what_is_computed(name):
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer, valid=(11,))
    inputs["encoder_hidden_states_mask"][0, 3] = False
    cache = {"name": name, "schedule": "110", "min_steps": 0}
    handle = dit_accel.accelerate(transformer, cache=cache, method="pooled", keep=0.5, min_tokens=0, block=16)
    for time in (0.9, 0.8, 0.7):
        with torch.no_grad(), transformer.cache_context("cond"):
            transformer(**{**inputs, "timestep": torch.tensor([time])})
    layers = len(transformer.transformer_blocks)
    report = handle.report()
    assert report.forwards == {"computed": 2, "reused": 1}
    assert report.fallbacks == {"a mask that keeps out text before other text": 2 * layers}
    assert report.dense_calls == 2 * layers


def test_strict_lets_a_forward_be_made_up_and_raises_before_one_is_computed():
    model = Model()
    stock = model.transformer.blocks[0].attn1.processor
    cache = {"name": "easy", "schedule": "101", "min_steps": 0}
    accelerate(model, cache, method="pooled", keep=0.5, min_tokens=0, block=16, strict=True)
    model("cond", 900)
    model.transformer.blocks[0].attn1.set_processor(stock)
    model("cond", 800)
    ran = []
    model.transformer.blocks[0].register_forward_pre_hook(lambda module, args: ran.append(module))
    with pytest.raises(FallbackError, match="processor was replaced"):
        model("cond", 700)
    assert not ran


@pytest.mark.parametrize("name", ["first_block", "tokens"])
def test_dense_steps_keep_the_order_of_sparse_ones_under_a_cache_of_tokens(name):
    """Tokens of a dense step are used in a sparse one: in another order they would be of other places."""
    pipe = tiny_wan_pipeline()
    sparse = {
        "method": "pooled",
        "keep": 1.0,
        "min_tokens": 0,
        "block": 16,
        "order": "tiles",
        "dense_above": 0.8,
    }
    cache = {"name": name, "schedule": "101010101010"}
    if name == "tokens":
        cache["selector"] = "norm"  # chance would take other tokens in another order
    with dit_accel.accelerate(pipe, cache=cache):
        stock = sample(pipe)
    with dit_accel.accelerate(pipe, cache=cache, **sparse) as handle:
        out = sample(pipe)
    assert handle.report().forwards["reused"] == 12
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5)
