"""The vLLM-Omni plugin behind its contract, and behind the real dispatcher where VLLM_OMNI_ROOT is set."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.errors import UsageError
from dit_accel.integrations.vllm_omni import GRID, AttentionFunction, attn_fn

from .hosts import SCALE, each_host, entry_point, told

LATENT = (3, 10, 14)  # tokens: 3 x 5 x 7
TOKENS = 105
OPTIONS = {"method": "rectified", "keep": 0.4, "block": 16, "min_tokens": 0}


@pytest.fixture(autouse=True)
def _nothing_ran_before() -> Iterator[None]:
    attn_fn._by_options.clear()
    yield
    attn_fn._by_options.clear()
    attn_fn._unknown.clear()


def qkv(tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, tokens, 4, 16, dtype=dtype) for _ in range(3))


def dense(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    by_head = (x.transpose(1, 2).double() for x in (query, key, value))
    return F.scaled_dot_product_attention(*by_head, scale=SCALE, is_causal=causal).transpose(1, 2)


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def test_the_entry_point_is_the_function() -> None:
    found = entry_point()
    assert (found.name, found.load()) == ("dit_accel", attn_fn)
    assert attn_fn.capabilities == {"supports_attention_mask": False, "supports_full_attn_spans": False}
    assert callable(attn_fn.geometry_fn)


@each_host
def test_keeping_everything_is_dense(host) -> None:
    given = qkv()
    out = host({**OPTIONS, "keep": 1.0, "strict": True})(*given, told(0, 4, LATENT))
    assert out.shape == given[0].shape and out.dtype == torch.bfloat16
    assert error(out, dense(*given)) < 0.01
    (report,) = attn_fn.reports()
    assert (report.sparse_calls, report.dense_calls, report.keep_achieved) == (1, 0, 1.0)


@each_host
def test_the_geometry_reaches_the_method(host) -> None:
    """Order and grid are used: neighbourhood attention needs them, and the plan is that of the grid."""
    given = qkv(dtype=torch.float16)
    options = {"method": "neighborhood", "window": [1, 3, 3], "order": "raster", "block": 8, "min_tokens": 0}
    host({**options, "strict": True})(*given, told(0, 4, LATENT))
    (report,) = attn_fn.reports()
    assert report.token_orders == {"raster": 1} and 0.05 < report.keep_achieved < 0.5


@each_host
def test_padding_in_the_sequence_leaves_a_line(host) -> None:
    """As Ulysses adds: the tokens are more than the grid's."""
    given = qkv(TOKENS + 3)
    out = host({**OPTIONS, "keep": 1.0})(*given, told(0, 4, LATENT))
    assert error(out, dense(*given)) < 0.01
    (report,) = attn_fn.reports()
    assert report.token_orders == {"raster: no grid is known": 1} and report.sparse_calls == 1


@each_host
def test_nothing_told_still_runs(host) -> None:
    given = qkv()
    assert error(host({**OPTIONS, "keep": 1.0, "strict": True})(*given), dense(*given)) < 0.01


@each_host
def test_first_steps_are_dense(host) -> None:
    attend, given = host({**OPTIONS, "dense_first": 0.5}), qkv()
    outs = [attend(*given, told(step, 4, LATENT)) for step in range(4)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[2], outs[3]) and not torch.equal(outs[1], outs[2])
    (report,) = attn_fn.reports()
    assert (report.sparse_calls, report.dense_calls, report.fallbacks, report.runs) == (2, 2, {}, 1)
    attend(*given, told(0, 4, LATENT))
    assert attn_fn.reports()[0].runs == 2


def test_a_batch_is_as_far_as_its_slowest_sample() -> None:
    given = qkv()
    params = {**OPTIONS, "dense_first": 0.5, **told(0, 4, LATENT)}
    params["denoise_step_idx"] = torch.tensor([3, 1])
    attn_fn(*given, params, is_causal=False, softmax_scale=SCALE)
    assert attn_fn.reports()[0].dense_calls == 1


@each_host
def test_causal_attention_is_dense_and_counted(host) -> None:
    given = qkv()
    out = host(OPTIONS, causal=True)(*given, told(0, 4, LATENT))
    assert error(out, dense(*given, causal=True)) < 0.01
    assert attn_fn.reports()[0].fallbacks == {"causal attention or dropout": 1}


@each_host
def test_masks_are_refused(host) -> None:
    with pytest.raises(ValueError, match="supports_attention_mask"):
        host(OPTIONS)(*qkv(), told(0, 4, LATENT), mask=torch.ones(2, TOKENS, dtype=torch.bool))


@pytest.mark.parametrize("name", ["attn_mask", "full_attn_spans"])
def test_a_mask_that_comes_all_the_same_is_an_error(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is not possible here"):
        attn_fn(*qkv(), {**OPTIONS, name: torch.ones(1)}, is_causal=False, softmax_scale=SCALE)


@each_host
def test_what_a_model_adds_does_not_disturb(host, caplog: pytest.LogCaptureFixture) -> None:
    """The contract: unknown keys are ignored. Told once, with the option that may have been meant."""
    attend, given = host({**OPTIONS, "kep": 0.2}), qkv()
    extra = {"kv_cache_dtype": "auto", "block_mask": object()}
    for _ in range(2):
        attend(*given, told(0, 4, LATENT), extra)
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2 and "'block_mask' is no option" in said[0] and "Did you mean 'keep'?" in said[1]
    assert attn_fn.reports()[0].sparse_calls == 2


@each_host
def test_a_wrong_option_says_where_it_is_given(host) -> None:
    with pytest.raises(UsageError, match="'pooled' needs a budget.*per_role.self.extra.NAME VALUE"):
        host({"min_tokens": 0})(*qkv(), told(0, 4, LATENT))
    with pytest.raises(UsageError, match="Unknown method 'poled'"):
        host({"method": "poled"})(*qkv(), told(0, 4, LATENT))
    with pytest.raises(UsageError, match="rules=.* is not possible here: .*without its layer or noise level"):
        host({**OPTIONS, "rules": [{"above": 0.5, "keep": 0.5}]})(*qkv(), told(0, 4, LATENT))


@each_host
def test_two_sets_of_options_are_counted_apart(host) -> None:
    given = qkv()
    one, other = host(OPTIONS), host({**OPTIONS, "keep": 0.8})
    for attend in (one, other, other):
        attend(*given, told(0, 4, LATENT))
    first, second = attn_fn.reports()
    assert (first.sparse_calls, second.sparse_calls) == (1, 2)
    assert first.keep_requested == 0.4 and second.keep_requested == 0.8


@pytest.mark.parametrize("form", ["tensor", "rows", "row"])
def test_geometry_in_every_form_that_is_told(form: str) -> None:
    raw = {"latent_shape": (21, 60, 104), "patch_size": (1, 2, 2)}
    forms = {"tensor": lambda x: torch.tensor([x, x]), "rows": lambda x: [list(x)], "row": lambda x: x}
    params = {name: forms[form](triple) for name, triple in raw.items()}
    assert AttentionFunction().geometry_fn((1, 32760, 40, 128), params) == {GRID: (21, 30, 52)}
    assert AttentionFunction().geometry_fn((1, 32768, 40, 128), params) == {}
    assert AttentionFunction().geometry_fn((1, 32760, 40, 128), {}) == {}


def test_a_compiled_model_goes_around_it() -> None:
    """Options and lists in it change from call to call: traced, each step would compile anew."""
    given = qkv(dtype=torch.float32)

    def block(query: Tensor, key: Tensor, value: Tensor, params: dict) -> Tensor:
        return attn_fn(query * 2, key, value, params, is_causal=False, softmax_scale=SCALE) + 1

    compiled = torch.compile(block, backend="eager")
    for step in range(3):
        params = {**OPTIONS, GRID: (3, 5, 7), **told(step, 4, LATENT)}
        assert torch.equal(compiled(*given, params), block(*given, params))
    assert attn_fn.reports()[0].sparse_calls == 6
