"""Region sampling, and sparse attention, whose options differ by expert: eight steps, of which the first makes five."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.errors import UsageError
from dit_accel.testing import tiny_wan_pipeline

STEPS = 8
REGION = {"sample_ratio": 0.5, "bucket": 4, "start": 2, "error_reset": ()}  # of 48 tokens
WHOLE, HALF, QUARTER = (f"{n} of 48 tokens" for n in (48, 24, 12))


@pytest.fixture
def pipe() -> Any:
    pipe = tiny_wan_pipeline(two_experts=True)
    pipe.register_to_config(boundary_ratio=0.75)
    return pipe


def sample(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    size = {"height": 64, "width": 96, "num_frames": 5}  # 2 x 4 x 6 tokens
    text = [torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 50)]
    return pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], num_inference_steps=STEPS, output_type="latent",
        generator=torch.Generator().manual_seed(seed), **size, **call,
    ).frames  # fmt: skip


def test_the_common_values_said_of_each_role_change_nothing(pipe):
    with dit_accel.accelerate(pipe, region=REGION):
        common = sample(pipe)
    aside = {"transformer": REGION, "transformer_2": REGION, "sample_ratio": 0.2, "bucket": 12}
    for region in ({**REGION, "transformer_2": {}}, aside):
        with dit_accel.accelerate(pipe, region=region):
            assert torch.equal(sample(pipe), common)


def test_each_role_has_its_own_share_and_start(pipe):
    """Steps 0 to 2, then 5 (the second expert's first) and 7 (the last) are whole; 3 and 4 a quarter, 6 a half."""
    handle = dit_accel.accelerate(pipe, region={**REGION, "transformer": {"sample_ratio": 0.25, "start": 3}})
    out = sample(pipe)
    report = handle.report()
    assert report.regions == {WHOLE: 10, QUARTER: 4, HALF: 2}
    assert report.roles == {"transformer": {"region": {"sample_ratio": 0.25, "start": 3}}}
    assert "transformer alone: region.sample_ratio=0.25, region.start=3" in str(report)
    assert torch.equal(sample(pipe), out)


@pytest.mark.parametrize("off", ["transformer", "transformer_2"])
def test_a_role_that_is_left_out_computes_everything(pipe, off):
    """As with resets at each of its steps: tokens that come back with the second expert are mended all the same."""
    handle = dit_accel.accelerate(pipe, region={**REGION, off: False})
    out, report = sample(pipe), handle.report(clear=True)
    own = range(5) if off == "transformer" else range(5, 8)
    assert report.whole_reasons["every token is asked for"] == 2 * len(own) and report.regions[HALF] > 0
    assert f"{off} alone: region off" in str(report)
    handle = dit_accel.accelerate(pipe, region={**REGION, "error_reset": tuple(own)})
    assert torch.equal(sample(pipe), out)
    assert handle.report().regions == report.regions


def test_another_selector_for_a_role(pipe):
    handle = dit_accel.accelerate(pipe, region={**REGION, "transformer_2": {"selector": "change", "keys": "drop"}})
    first, second = (engine.region for engine in handle._engines)
    held: list[tuple[bool, bool]] = []

    def look(pipe: Any, step: int, time: Any, kwargs: dict) -> dict:
        held.append((any(kept.keys for kept in first._kept.values()), any(kept.keys for kept in second._kept.values())))
        return kwargs

    out = sample(pipe, callback_on_step_end=look)
    assert (True, False) in held and not any(later for _, later in held)  # "drop" keeps no keys
    assert handle.report().regions == {WHOLE: 8, HALF: 8} and torch.equal(sample(pipe), out)


def test_a_run_that_broke_off_leaves_nothing(pipe):
    dit_accel.accelerate(pipe, region={**REGION, "transformer_2": False})
    fresh = sample(pipe)
    for step in (4, 6):

        def stop(pipe: Any, now: int, time: Any, kwargs: dict, at: int = step) -> dict:
            if now == at:
                raise KeyboardInterrupt
            return kwargs

        with pytest.raises(KeyboardInterrupt):
            sample(pipe, seed=1, callback_on_step_end=stop)
        assert torch.equal(sample(pipe), fresh)


def test_a_cache_that_keeps_tokens_may_stand_where_region_sampling_does_not(pipe):
    taylor = {"name": "taylor", "interval": 2, "warmup": 1, "min_steps": 0}
    with pytest.raises(UsageError, match="cache 'taylor' keeps tokens"):
        dit_accel.accelerate(pipe, region={**REGION, "transformer": False}, cache=taylor)
    handle = dit_accel.accelerate(
        pipe, region={**REGION, "transformer_2": False}, cache={**taylor, "transformer": False}
    )
    out, report = sample(pipe), handle.report()
    # two of the first expert's steps are whole; of the second's three, all of which are, one is made up
    assert report.regions == {WHOLE: 4 + 6, HALF: 6}
    assert report.forwards == {"computed": 14, "reused": 2}
    assert torch.equal(sample(pipe), out)


# -- sparse attention

SPARSE = dict(method="random", keep=0.66, block=16, order="raster", min_tokens=0)  # two blocks of three


def test_sparse_attention_has_its_own_share_by_role(pipe):
    with dit_accel.accelerate(pipe, **SPARSE):
        common = sample(pipe)
    with dit_accel.accelerate(pipe, **SPARSE, transformer={"keep": 0.66}, transformer_2={}):
        assert torch.equal(sample(pipe), common)
    handle = dit_accel.accelerate(pipe, **SPARSE, transformer_2={"keep": 0.33, "dense_layers": [0]})
    report = (sample(pipe), handle.report())[1]
    assert report.keep_per_role == {"transformer": pytest.approx(2 / 3), "transformer_2": pytest.approx(1 / 3)}
    assert report.dense_reasons == {"dense layer": 2 * 3} and report.sparse_calls == 2 * (2 * 5 + 3)
    assert report.keep_requested is None  # there is not one
    assert "transformer_2 alone: sparse.keep=0.33, sparse.dense_layers=[0]; read 33.3% of the keys" in str(report)


def test_dense_attention_for_one_role_is_counted(pipe):
    dense: list[Tensor] = []
    sample(pipe, callback_on_step_end=lambda _, __, ___, given: dense.append(given["latents"]) or {})
    handle = dit_accel.accelerate(pipe, **SPARSE, transformer=False)
    sparse: list[Tensor] = []
    sample(pipe, callback_on_step_end=lambda _, __, ___, given: sparse.append(given["latents"]) or {})
    assert [torch.equal(*pair) for pair in zip(dense, sparse, strict=True)] == [True] * 5 + [False] * 3
    report = handle.report()
    assert report.dense_reasons == {"sparse attention is off": 2 * 2 * 5} and not report.fallbacks
    assert report.keep_requested == 0.66 and report.sparse_calls == 2 * 2 * 3
    handle.remove()
    assert not any(hasattr(module, "_dit_accel") for module in pipe.transformer.modules())
