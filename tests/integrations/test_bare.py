"""Sparse attention of bare calls: the dense answer when all is kept, the plan's otherwise, and nothing silent."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.errors import FallbackError, UsageError
from dit_accel.integrations.bare import SparseAttention

GRID = (3, 5, 7)  # odd, with a short last block
TOKENS = math.prod(GRID)
KEEPING = {"pooled": {"keep": 1.0}, "rectified": {"keep": 1.0}, "sparge": {"keep": 1.0}, "svg2": {"keep": 1.0}}


def qkv(tokens: int = TOKENS, heads: int = 4, batch: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, tokens, heads, 16) for _ in range(3))


def dense(query: Tensor, key: Tensor, value: Tensor, **call: object) -> Tensor:
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*by_head, **call).transpose(1, 2)


def make(**options: object) -> SparseAttention:
    return SparseAttention(**{"method": "pooled", "keep": 0.3, "block": 16, "min_tokens": 0, **options})


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("grid", [GRID, None], ids=["grid", "line"])
@pytest.mark.parametrize("method", KEEPING)
def test_keeping_everything_is_dense(method: str, grid: tuple | None) -> None:
    attend = make(method=method, strict=True, **KEEPING[method])
    given = qkv()
    assert difference(attend(*given, grid=grid), dense(*given)) < 2e-6
    report = attend.report()
    assert (report.sparse_calls, report.dense_calls, report.keep_achieved) == (1, 0, 1.0)


@pytest.mark.parametrize("order", ["raster", "tiles", "packed", "gilbert"])
def test_it_reads_what_it_says_and_keeps_the_tokens_order(order: str) -> None:
    """A few heads attend to next to nothing but their own token: wherever a block ends, that one is read."""
    query = 30 * F.one_hot(torch.arange(TOKENS), 128).float()[None, :, None]
    value = torch.randn(1, TOKENS, 1, 128)
    attend = make(order=order, keep=0.4)
    out = attend(query, query, value, grid=GRID)
    assert difference(out, value) < 1e-3
    report = attend.report()
    assert report.sparse_calls == 1 and 0.2 < report.keep_achieved < 0.8
    assert report.token_orders == {order: 1}


def test_the_scale_is_used() -> None:
    attend, given = make(keep=1.0), qkv()
    assert difference(attend(*given, grid=GRID, scale=0.5), dense(*given, scale=0.5)) < 4e-6


def test_a_grid_that_the_tokens_do_not_fill_is_a_line() -> None:
    given = qkv(TOKENS + 4)
    attend = make()
    assert torch.equal(attend(*given, grid=GRID), attend(*given))
    assert attend.report().token_orders == {"raster: no grid is known": 2}


@pytest.mark.parametrize("method", ["radial", "svg1", "neighborhood", "clear"])
def test_a_method_that_looks_at_places_is_dense_without_a_grid(method: str) -> None:
    options = {"method": method, "min_tokens": 0, **({"keep": 0.5} if method == "svg1" else {})}
    attend = SparseAttention(**options)
    given = qkv()
    assert torch.equal(attend(*given), dense(*given))
    (reason,) = attend.report().fallbacks
    assert reason.startswith("the method looks at places")
    with pytest.raises(FallbackError, match="looks at places"):
        SparseAttention(**options, strict=True)(*given)


def test_what_is_no_self_attention_is_dense_and_counted() -> None:
    attend = make()
    query, key, value = qkv()
    assert torch.equal(attend(query, key[:, :9], value[:, :9]), dense(query, key[:, :9], value[:, :9]))
    grouped = dense(query, key[:, :, :2], value[:, :, :2], enable_gqa=True)
    assert torch.equal(attend(query, key[:, :, :2], value[:, :, :2], grid=GRID), grouped)
    assert torch.equal(attend(query, key, value, is_causal=True), dense(query, key, value, is_causal=True))
    report = attend.report()
    assert report.fallbacks == {"queries and keys of different shape": 2, "causal attention or dropout": 1}
    assert report.dense_kernels == {"torch": 3} and report.sparse_calls == 0


def test_few_tokens_and_wanted_gradients_are_dense() -> None:
    given = qkv()
    few = make(min_tokens=TOKENS + 1)
    assert torch.equal(few(*given, grid=GRID), dense(*given)) and not few.report().fallbacks
    for wanted in range(3):
        attend = make()
        now = [x.detach().requires_grad_(place == wanted) for place, x in enumerate(given)]
        attend(*now, grid=GRID).square().sum().backward()
        assert now[wanted].grad is not None and sum(attend.report().fallbacks.values()) == 1


def test_first_steps_are_dense_where_steps_are_told() -> None:
    attend, given = make(dense_first=0.5), qkv()
    for step in range(4):
        attend(*given, grid=GRID, step=step, steps=4)
    report = attend.report()
    assert (report.sparse_calls, report.dense_calls, report.fallbacks) == (2, 2, {})
    assert set(report.keep_per_step) == {2, 3}
    attend(*given, grid=GRID)
    assert attend.report().fallbacks == {"dense_first is set, and the host tells no step": 1}


def test_a_lower_step_begins_a_run_and_says_what_ran(caplog: pytest.LogCaptureFixture) -> None:
    attend, given = make(), qkv()
    with caplog.at_level(logging.INFO, logger="dit_accel"):
        for step in (0, 0, 1, 1, 0):
            attend(*given, grid=GRID, step=step, steps=2)
    assert attend.report().runs == 2
    assert "until now: 4 of 4 self-attention calls sparse" in caplog.text


def test_what_failed_is_dense_for_the_run_and_tried_again_in_the_next() -> None:
    attend, given = make(), qkv()
    sparse = attend(*given, grid=GRID)
    attend._attending.guards._off[(0, tuple(given[0].shape), torch.float32, torch.device("cpu"))] = "it failed"
    assert difference(attend(*given, grid=GRID), dense(*given)) < 2e-6  # in another order of the tokens
    assert attend.report().fallbacks == {"it failed": 1}
    attend.begin()
    assert torch.equal(attend(*given, grid=GRID), sparse)


def test_two_runs_are_equal() -> None:
    attend, given = make(method="rectified"), qkv()
    first = attend(*given, grid=GRID, step=0, steps=1)
    attend(*qkv(), grid=GRID, step=1, steps=2)
    assert torch.equal(attend(*given, grid=GRID, step=0, steps=1), first)


REFUSED = {
    "dense_layers": (0,),
    "dense_above": 0.9,
    "dense_below": 0.1,
    "predict_drift": 0.2,
    "rules": [{"above": 0.5, "keep": 0.5}],
    "predict_every": 2,
    "share_plans": True,
    "transformer": {"keep": 0.5},
    "transformer_2": False,
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_a_bare_call_cannot_serve_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=.* is not possible here: .*call without its"):
        make(**{name: REFUSED[name]})


def test_a_drift_guard_is_refused() -> None:
    with pytest.raises(UsageError, match="drift_every=4 is not possible here"):
        make(drift_every=4, drift_limit=0.2)


@pytest.mark.parametrize(("method", "why"), [("lite", "learns"), ("sla", "weights")])
def test_methods_that_a_bare_call_cannot_serve_are_refused(method: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"'{method}' is not possible here: it .*{why}"):
        SparseAttention(method=method, **({"keep": 0.1} if method == "sla" else {}))


@pytest.mark.parametrize("module", ["bare", "vllm_omni"])
def test_it_needs_no_diffusers(module: str) -> None:
    """vLLM-Omni pins a release of its own."""
    code = (
        "import sys, torch\n"
        "sys.modules['diffusers'] = None\n"
        f"import dit_accel.integrations.{module}\n"
        "from dit_accel.integrations.bare import SparseAttention\n"
        "x = torch.randn(1, 64, 2, 16)\n"
        "attend = SparseAttention(method='rectified', keep=0.5, min_tokens=0, strict=True)\n"
        "attend(x, x, x, grid=(1, 8, 8))\n"
        "assert attend.report().sparse_calls == 1"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
