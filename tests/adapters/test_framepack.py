"""What the FramePack adapter says about its tokens, held against the model itself. Odd grids, text with padding."""

import pytest
import torch
from hunyuan_models import WITH_MEMORY, remembering, run_branches
from joint_models import FULL, ORDERS, run

import dit_accel
from dit_accel.adapters import find_adapter, framepack
from dit_accel.errors import FallbackError, LayoutError
from dit_accel.methods import load_method
from dit_accel.testing import tiny_framepack_inputs, tiny_framepack_transformer

HISTORY = "history of other scales before the video"
PLACES = f"the method looks at places, and the tokens are no one grid ({HISTORY})"


def close(out, true):
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-5)


def sparse(transformer, method="pooled", **options):
    """The handle of a strict installation that reads everything, unless `keep` is given."""
    options = {"block": 16, "min_tokens": 0, "strict": True, **options}
    made = load_method(method, **FULL[method]) if "keep" not in options else method
    return dit_accel.accelerate(transformer, None, method=made, **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("valid", [1, 11, 19])
def test_keeping_everything_is_stock_diffusers_whatever_order_is_asked_for(order, batch, valid):
    transformer = tiny_framepack_transformer()
    inputs = tiny_framepack_inputs(transformer, valid=valid, batch=batch)
    true = run(transformer, inputs)
    with sparse(transformer, order=order) as handle:
        close(run(transformer, inputs), true)
        report = handle.report()
    assert report.sparse_calls == 2 and report.dense_calls == 0 and report.keep_achieved == 1
    assert list(report.token_orders) == ["raster" if order == "raster" else f"raster: {HISTORY}"]


@pytest.mark.parametrize("grid", [(1, 3, 3), (2, 4, 8), (3, 1, 9), (5, 6, 5)], ids=str)
def test_history_is_counted_right(grid):
    """A wrong number would be a dense call, which a strict installation refuses."""
    transformer = tiny_framepack_transformer()
    inputs = tiny_framepack_inputs(transformer, grid, valid=11)
    true = run(transformer, inputs)
    with sparse(transformer):
        close(run(transformer, inputs), true)


def test_history_of_another_size_than_the_video():
    """The pipeline has both alike; the finest scale is cut off where it leaves a row over, the others are padded."""
    transformer = tiny_framepack_transformer()
    inputs = tiny_framepack_inputs(transformer)
    for name in [name for name in inputs if name.startswith("latents_")]:
        assert inputs[name].shape[3:] == (10, 14)
    inputs["hidden_states"] = torch.nn.functional.pad(inputs["hidden_states"], (0, 1, 0, 1))  # 11 x 15
    true = run(transformer, inputs)
    with sparse(transformer):
        close(run(transformer, inputs), true)


@pytest.mark.parametrize("method", FULL)
def test_every_method_runs_or_says_why_not(method):
    transformer = tiny_framepack_transformer()
    inputs = tiny_framepack_inputs(transformer, (3, 5, 6), valid=13, batch=2)
    true = run(transformer, inputs)
    with sparse(transformer, method, strict=False) as handle:
        out = run(transformer, inputs)
        report = handle.report()
    if method in ("svg1", "neighborhood", "clear", "radial"):
        assert torch.equal(out, true) and dict(report.fallbacks) == {PLACES: 2}
        with sparse(transformer, method), pytest.raises(FallbackError, match="no one grid"):
            run(transformer, inputs)
    else:
        close(out, true)
        assert report.sparse_calls == 2 and not report.fallbacks


def test_padding_is_not_read_and_text_is_kept():
    """Other numbers in a batch's padding change nothing, bit for bit; the plan covers all but them."""
    transformer = tiny_framepack_transformer()
    inputs = tiny_framepack_inputs(transformer, valid=11, batch=2)
    seen = []
    with sparse(transformer, keep=0.3) as handle:
        handle.observe(lambda call, layout, q, k, v, plan: seen.append((call, q.shape[1], plan.to_token_mask())))
        first = run(transformer, inputs)
        text = inputs["encoder_hidden_states"].clone()
        text[:, 11:] = 7.0
        assert torch.equal(run(transformer, {**inputs, "encoder_hidden_states": text}), first)
    call, tokens, mask = seen[0]
    assert call.segments == (("video", 0, 203), ("text", 203, 223), ("pad", 223, 231)) and tokens == 223
    assert mask[..., 203:].all() and mask[..., 203:, :].all() and not mask.all()
    assert not mask[..., :203, :98].all(), "history competes with the video's tokens"


@pytest.mark.parametrize("method", WITH_MEMORY)
def test_a_branch_is_the_same_with_and_without_the_other(method):
    """Its pipeline names no branch; the conditioning tells them apart."""
    transformer = tiny_framepack_transformer()
    inputs = {
        name: tiny_framepack_inputs(transformer, valid=valid, seed=seed)
        for seed, (name, valid) in enumerate((("c", 11), ("u", 2)))
    }

    def outputs(order):
        return run_branches(transformer, remembering(method, 0.4), inputs, order, named=False)

    alone = outputs("c")
    assert torch.equal(outputs("cu"), alone) and torch.equal(outputs("uc"), alone)


def test_a_batch_row_is_the_same_in_other_company():
    transformer = tiny_framepack_transformer()
    pair, other = (tiny_framepack_inputs(transformer, batch=2, seed=seed) for seed in (0, 1))
    mixed = {k: pair[k] if "indices" in k else torch.cat([pair[k][:1], other[k][1:]]) for k in pair}
    with sparse(transformer, keep=0.3):
        first, second = run(transformer, pair), run(transformer, mixed)
    close(second[:1], first[:1])
    assert float((second[1:] - first[1:]).norm() / first[1:].norm()) > 1e-2


def test_removing():
    transformer = tiny_framepack_transformer()
    assert not hasattr(transformer, "set_attn_processor"), "so that installing sets each by itself"
    modules = {path: m for path, m in transformer.named_modules() if hasattr(m, "get_processor")}
    stock = {path: module.processor for path, module in modules.items()}
    inputs = tiny_framepack_inputs(transformer)
    true = run(transformer, inputs)
    with sparse(transformer, keep=0.3):
        assert not torch.equal(run(transformer, inputs), true)
    assert all(modules[path].processor is one for path, one in stock.items()) and len(stock) == 3
    assert torch.equal(run(transformer, inputs), true)


def test_facts_and_attentions():
    transformer = tiny_framepack_transformer()
    inputs = tiny_framepack_inputs(transformer, valid=(11, 19), batch=2)
    facts = framepack.read(transformer, inputs)
    history = 4 * 2 * 2 + 1 * 3 * 4 + 2 * 5 * 7  # 16, 2 and 2 frames of 10 x 14 at their scales
    assert facts.grid == (1, 1, history + 105) == (1, 1, 203) and facts.loose == HISTORY
    assert facts.timestep == 500 and facts.text == 28 and facts.text_valid == (20, 28)
    assert facts.condition is inputs["encoder_hidden_states"] and find_adapter(transformer) is framepack
    alone = framepack.read(transformer, tiny_framepack_inputs(transformer, valid=11))
    assert alone.text == 20 and alone.text_valid is None, "the model trims a single prompt itself"
    long = tiny_framepack_inputs(transformer, text=400, valid=331)
    long["encoder_attention_mask"] = long["encoder_attention_mask"].bfloat16()  # which cannot hold 331
    assert framepack.read(transformer, long).text == 340
    with pytest.raises(LayoutError, match="at least one patch"):
        framepack.read(transformer, {**inputs, "hidden_states": torch.zeros(1, 4, 3, 1, 8)})
    with pytest.raises(LayoutError, match="got no image_embeds"):
        framepack.read(transformer, {**inputs, "image_embeds": None})
    paths = dict(framepack.self_attentions(transformer))
    assert paths == {"transformer_blocks.0.attn": 0, "single_transformer_blocks.0.attn": 1}
