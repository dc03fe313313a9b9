"""For tests of adapters: a forward, a SparseProcessor, every method told to read everything, and checks they share."""

import pytest
import torch

import dit_accel
from dit_accel import SparseProcessor
from dit_accel.errors import FallbackError
from dit_accel.methods import load_method

NEEDS_GRID = ("svg1", "neighborhood", "clear", "radial")  # methods that look at where tokens stand
ORDERS = ("raster", "tiles", "packed", "gilbert")
# everything, through each method that says how to read it
FULL = {
    "pooled": {"keep": 1.0},
    "rectified": {"keep": 1.0},
    "sparge": {"keep": 1.0},
    "lite": {"threshold": -1e4},
    "svg1": {"keep": 1.0},
    "svg2": {"keep": 1.0},
    "nabla": {"top_p": 1.0, "keep": 1.0},
    "neighborhood": {"window": [1.0, 1.0, 1.0]},
    "clear": {"radius": 100},
    "radial": {"decay_factor": 100, "vote": 0},
}

# methods with and without a memory between steps, at budgets that show
LITTLE = {"pooled": {"keep": 0.4}, "lite": {"threshold": -0.2}, "svg2": {"keep": 0.4}}


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def run_with_sound(transformer, inputs):
    """Video and sound of MiniMax-H3 side by side, `[B, all numbers]`."""
    with torch.no_grad():
        return torch.cat([x.flatten(1) for x in transformer(**inputs, return_dict=False)], 1)


def sparse(transformer, method="pooled", **options):
    """Set a strict SparseProcessor that reads everything, unless `keep` is given, and return it."""
    options = {"block": 16, "min_tokens": 0, "strict": True, **options}
    made = load_method(method, **FULL[method]) if "keep" not in options else method
    if made == "sparge":
        options["similarity"] = -1.0  # tokens of random weights are unlike one another
    processor = SparseProcessor(transformer, made, **options)
    transformer.set_attn_processor(processor)
    return processor


def assert_a_line(transformer, inputs, why, calls, method):
    """Tokens that are no one grid keep the model's own order; a method that looks at places runs dense and says why."""
    true = run(transformer, inputs)
    processor = sparse(transformer, method, strict=False)
    out = run(transformer, inputs)
    report = processor.report
    if method in NEEDS_GRID:
        assert torch.equal(out, true)
        reason = f"the method looks at places, and the tokens are no one grid ({why})"
        assert report.sparse_calls == 0 and dict(report.fallbacks) == {reason: calls}
        sparse(transformer, method)
        with pytest.raises(FallbackError, match="looks at places"):
            run(transformer, inputs)
        return
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-5)
    assert report.sparse_calls == calls and report.dense_calls == 0
    assert list(report.token_orders) in (["raster"], [f"raster: {why}"])
    sparse(transformer, method, keep=0.3)
    assert float((run(transformer, inputs) - true).norm() / true.norm()) > 1e-3


def assert_the_models_order(transformer, inputs, why, *, run=run, **options):
    """Tokens that were to be brought into tiles keep the model's own order, and the report says why."""
    true = run(transformer, inputs)
    processor = sparse(transformer, order="tiles", **options)
    torch.testing.assert_close(run(transformer, inputs), true, rtol=1e-4, atol=1e-5)
    assert list(processor.report.token_orders) == [f"raster: {why}"]


def assert_text_is_whole(transformer, inputs, method, text, tokens, layers):
    """Text stands first, reads all and is read by all, where little is kept of the image behind it."""
    engine = sparse(transformer, method, keep=0.3).engine
    seen = []
    engine.observer = lambda call, layout, q, k, v, plan: seen.append((call, layout, plan.to_token_mask()))
    run(transformer, inputs)
    assert [call.layer for call, _, _ in seen] == list(range(layers))
    for call, layout, mask in seen:
        assert call.segments == (("text", 0, text), ("video", text, tokens))
        assert layout.text == text and layout.text_first
        assert mask[..., :text].all() and mask[..., :text, :].all()
        assert 0.1 < mask[..., text:, text:].float().mean() < 0.8


def assert_runs_again_and_again(pipe, sample, method, calls, *others):
    """Each run is as a fresh one, all of its self-attentions are sparse, and afterwards the pipeline is as it was.

    Args:
        sample: makes a short run; takes changes of its call.
        calls: self-attentions of a run.
        others: changes, each of a run in between.
    """
    stocks, true = dict(pipe.transformer.attn_processors), sample()
    made = load_method(method, **LITTLE[method])
    with dit_accel.accelerate(pipe, None, method=made, block=16, min_tokens=0, strict=True) as handle:
        first = sample()
        for changes in others:
            sample(**changes)
        again = sample()
        report = handle.report()
    assert torch.equal(first, again) and not torch.equal(first, true)
    assert report.runs == 2 + len(others) and report.sparse_calls == calls * report.runs
    assert report.dense_calls == 0 and not report.stateless and report.keep_achieved < 1
    after = pipe.transformer.attn_processors
    assert after.keys() == stocks.keys() and all(after[path] is stock for path, stock in stocks.items())
    assert not any(module._forward_hooks for module in pipe.transformer.modules())
    assert torch.equal(sample(), true)
