"""A sparse call that fails is dense, with the reason, for the rest of the run; the next run is as fresh."""

import copy
import math

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel import testing
from dit_accel.errors import FallbackError
from dit_accel.guards import NOT_FINITE, OUT_OF_MEMORY, Attended, attempt
from dit_accel.methods import pooled

MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ...")
FAULTS = {"nan": (math.nan, NOT_FINITE), "infinity": (-math.inf, NOT_FINITE), "memory": (MEMORY, OUT_OF_MEMORY)}
BOTH = 2  # branches of guidance
STEPS = 3


OPTIONS = {
    "plain": {},
    "predict_every": {"predict_every": 2},
    "share_plans": {"share_plans": True},
    "svg2": {"method": "svg2", "block": None},  # with a memory, as has
    "lite": {"method": "lite", "keep": None},
}
CASES = [("infinity", "plain"), *((fault, options) for fault in ("nan", "memory") for options in OPTIONS)]


@pytest.mark.parametrize(("fault", "options"), CASES, ids=["-".join(case) for case in CASES])
def test_it_is_dense_in_that_layer(pipe, sample, accelerate, faulty, fault, options, caplog):
    """As if that layer had been asked to be dense; then, as if nothing had been."""
    fault, options = FAULTS[fault], OPTIONS[options]
    with accelerate(pipe, dense_layers=(1,), **options) as handle:
        dense_there, held = sample(pipe), handle.report().bytes_held
    with accelerate(pipe, **options) as handle:
        fresh = sample(pipe)
        assert not handle.report(clear=True).fallbacks
        faulty.follow(handle).at(1, fault[0])
        assert torch.equal(sample(pipe), dense_there) and not torch.equal(fresh, dense_there)
        report = handle.report(clear=True)
        assert report.dense_reasons == report.fallbacks == {fault[1]: BOTH * STEPS}
        assert report.bytes_held == held  # nothing is kept for that layer
        assert report.sparse_calls == BOTH * STEPS * 2 and report.dense_calls == BOTH * STEPS
        assert f"dense because: {fault[1]} (6)" in str(report)
        assert torch.equal(sample(pipe), fresh) and not handle.report().fallbacks
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{fault[1]}: dense instead, in layer 1 from step 0 on") and "\n" not in warning
    more = "(CUDA out of memory. Tried to allocate 20.00 GiB)" if fault[0] is MEMORY else "[1, 84, 2, 12] in torch."
    assert more in warning


@pytest.mark.parametrize("fault", ["nan", "memory"])
def test_under_strict_it_ends_the_run(pipe, sample, accelerate, faulty, fault):
    fault = FAULTS[fault]
    with accelerate(pipe, strict=True) as handle:
        fresh = sample(pipe)
        faulty.follow(handle).at(2, fault[0])
        with pytest.raises(FallbackError, match=f"would run dense: {fault[1]}"):
            sample(pipe, seed=1)
        assert torch.equal(sample(pipe), fresh)


def test_memory_may_run_out_in_a_later_step_and_in_a_plan(pipe, sample, accelerate, monkeypatch):
    """What was carried over of that layer is dropped; no other layer is touched."""
    predict, calls = pooled.Method.predict, [0]

    def short_of_memory(self, query, key, layout, call, state):
        calls[0] += 1
        if calls[0] == 3 * BOTH + 2:  # in the second step, of cond
            raise MEMORY
        return predict(self, query, key, layout, call, state)

    with accelerate(pipe) as handle:
        fresh = sample(pipe)
        handle.report(clear=True)
        monkeypatch.setattr(pooled.Method, "predict", short_of_memory)
        out = sample(pipe)
        report = handle.report()
        assert report.fallbacks == {OUT_OF_MEMORY: BOTH * (STEPS - 1)} and report.sparse_calls == 6 * STEPS - 4
        assert out.isfinite().all() and not torch.equal(out, fresh)
        monkeypatch.undo()
        assert torch.equal(sample(pipe), fresh)


def test_other_errors_are_not_swallowed(pipe, sample, accelerate, faulty):
    with accelerate(pipe) as handle:
        fresh = sample(pipe)
        faulty.follow(handle).at(1, RuntimeError("an illegal memory access was encountered"))
        with pytest.raises(RuntimeError, match="illegal memory access"):
            sample(pipe, seed=1)
        assert torch.equal(sample(pipe), fresh) and not handle.report().fallbacks


def test_main_memory_may_run_out_too(pipe, sample, accelerate, faulty):
    with accelerate(pipe) as handle:
        words = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        faulty.follow(handle).at(0, RuntimeError(words))
        sample(pipe)
        assert list(handle.report().fallbacks) == [OUT_OF_MEMORY]


# -- whose fault it is


def test_a_poisoned_weight_is_the_models_fault(pipe, sample, accelerate, caplog):
    """Nothing is made dense for it, which would not help."""
    bias = pipe.transformer.blocks[1].attn1.to_v.bias
    with accelerate(pipe) as handle:
        fresh, good = sample(pipe), bias[3].item()
        bias.data[3] = math.nan
        assert not sample(pipe).isfinite().all()
        report = handle.report()
        assert not report.fallbacks and report.guards[attempt.INPUTS] >= 2  # it and the layers behind it
        assert attempt.INPUTS in str(report) and report.to_dict()["guards"] == report.guards
        assert caplog.text.count("the model or its input is at fault") == 1
        bias.data[3] = good
        assert torch.equal(sample(pipe), fresh)


def test_a_hook_that_spoils_a_layer_is_found_where_it_strikes(pipe, sample, accelerate):
    def spoil(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill(torch.arange(out.shape[-1]) == 5, math.inf)

    with accelerate(pipe) as handle:
        fresh = sample(pipe)
        hook = pipe.transformer.blocks[0].register_forward_hook(spoil)
        sample(pipe)
        hook.remove()
        report = handle.report()
        # layers 1 and 2, at the first call of each; not layer 0
        assert report.guards == {attempt.INPUTS: 2} and not report.fallbacks
        assert torch.equal(sample(pipe), fresh)


@torch.no_grad()
def test_what_dense_attention_cannot_do_either_is_no_fall_back(pipe, accelerate):
    """Finite queries whose scores are not."""
    handle = accelerate(pipe)
    engine = handle._engines[0]
    qkv = tuple(torch.full((1, 8, 2, 4), 1e30) for _ in range(3))
    now = dit_accel.trajectory.Call(1, "cond", 0, 1.0, (1, 2, 4), (("video", 0, 8),), "transformer", 3, 0)

    def dense(query: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, *qkv[1:])))

    def compute() -> Attended:
        return Attended(dense(qkv[0]), "a kernel", torch.tensor(1), 1)

    done = engine.attending.guards.attempt(compute, dense, qkv, now, engine.tally)
    assert isinstance(done, Attended) and engine.tally.guards == {attempt.DENSE_TOO: 1}


# -- what it costs


def test_only_first_calls_are_looked_at(pipe, sample, accelerate, monkeypatch):
    looks, look = [], attempt.is_finite
    monkeypatch.setattr(attempt, "is_finite", lambda x: looks.append(1) or look(x))
    with accelerate(pipe):
        sample(pipe, steps=5)
        assert len(looks) == 3  # one a layer; not one a branch or step
        sample(pipe, steps=5)
        assert len(looks) == 6  # a run knows nothing of the one before
        sample(pipe, steps=1, num_frames=9)
        assert len(looks) == 9


# -- wherever sparse attention runs


def test_padded_prompts(accelerate, faulty):
    """Rows in groups, a mask, joint attention."""
    transformer = testing.tiny_hunyuan_video_transformer()
    inputs = testing.tiny_hunyuan_video_inputs(transformer, text=19, valid=(3, 11), batch=2)

    def run():
        with torch.no_grad():
            return transformer(**inputs, return_dict=False)[0]

    with accelerate(transformer, dense_layers=(1,)):
        dense_there = run()
    with accelerate(transformer) as handle:
        fresh = run()
        faulty.follow(handle).at(1, math.nan)
        handle.begin()
        out = run()
        torch.testing.assert_close(out, dense_there)
        assert handle.report().fallbacks == {NOT_FINITE: 1}
        handle.begin()
        assert torch.equal(run(), fresh)


def test_blocks_of_region_sampling(pipe, sample, accelerate, faulty):
    """Their calls are of another shape, and so a kind of their own."""
    part = {"unit": "block", "start": 1, "error_reset": ()}
    with accelerate(pipe, order="packed", region=part) as handle:
        fresh = sample(pipe, steps=5)
        sparse = handle.report(clear=True).sparse_calls
        faulty.only_parts_of, faulty.times = 84, 1
        out = sample(pipe, steps=5)
        assert not faulty.times and out.isfinite().all()
        report = handle.report()
        assert report.fallbacks == {NOT_FINITE: BOTH * 3}  # in the first layer, in all steps but the first and last
        assert report.sparse_calls == sparse - BOTH * 3
        assert torch.equal(sample(pipe, steps=5), fresh)


def test_a_linear_layer(pipe, sample, accelerate, tmp_path, monkeypatch):
    from dit_accel.sla.layers import SlaLayers
    from dit_accel.sla.spec import SlaSpec
    from dit_accel.sla.weights import LayerWeights, SlaWeights, save_sla_weights

    layers = {n: LayerWeights(torch.eye(12), torch.zeros(12)) for n in range(3)}
    spec = SlaSpec(3, 12, "WanTransformer3DModel", linear_layers=(1,), keep=0.4, block=16)
    save_sla_weights(tmp_path / "a.safetensors", SlaWeights(spec, layers))
    known = {"method": "sla", "weights": str(tmp_path / "a.safetensors"), "keep": None, "block": None}
    attend = SlaLayers.attend_linearly
    with accelerate(pipe, dense_layers=(), **known) as handle:
        fresh = sample(pipe)
        assert handle.report(clear=True).linear_calls == {1: 6}
        monkeypatch.setattr(SlaLayers, "attend_linearly", lambda *args: attend(*args) * math.nan)
        out = sample(pipe)
        assert out.isfinite().all() and handle.report(clear=True).fallbacks == {NOT_FINITE: 6}
        monkeypatch.undo()
        assert torch.equal(sample(pipe), fresh)


def test_a_copy_has_guards_of_its_own(accelerate, faulty):
    transformer = testing.tiny_wan_transformer()
    inputs = testing.tiny_wan_inputs(transformer)

    def run(transformer):
        with torch.no_grad():
            return transformer(**inputs, return_dict=False)[0]

    handle = accelerate(transformer)
    faulty.follow(handle).at(0, math.nan)
    run(transformer)
    double = copy.deepcopy(transformer)
    copied = double.blocks[0].attn1.processor.engine
    copied.observer = lambda call, *rest: setattr(faulty, "_here", call.layer)
    run(double)
    assert not copied.report().fallbacks and handle.report().fallbacks == {NOT_FINITE: 1}
    faulty.at(1, math.nan)
    copied.trajectory.begin()
    run(double)
    assert copied.report().fallbacks == {NOT_FINITE: 1}
    assert handle.report().fallbacks == {NOT_FINITE: 1}


def test_under_compile(accelerate, faulty):
    """The check stands inside the opaque op, so that compiled models have it too."""
    torch._dynamo.reset()
    transformer = testing.tiny_wan_transformer()
    inputs = testing.tiny_wan_inputs(transformer)
    handle = accelerate(transformer)
    faulty.follow(handle).at(1, math.nan)
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert transformer(**inputs, return_dict=False)[0].isfinite().all()
    assert handle.report().fallbacks == {NOT_FINITE: 1}
