"""For tests of families of joint attention: a forward, a SparseProcessor, and every method told to read everything."""

import pytest
import torch

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


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


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
