"""Models of ComfyUI under the pack: what stays the same, what is sparse, what is left out, and what is told of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from running import LARGE, SMALL, cache, report_of, sample, sparse, with_settings

from dit_accel.errors import FallbackError, UnknownModelError, UsageError
from dit_accel.integrations.comfyui import sampling as sampling_module
from dit_accel.integrations.comfyui.patch import KEY, patch_on, put_settings, report_on
from dit_accel.integrations.comfyui.settings import Settings, method_choices, sparse_options

LAYERS = {"wan": {2, 3}, "hunyuan": {3, 4}, "flux": {3, 4}, "sd3": {3, 4}}  # of the stand-in's models, of the core's

# -- what stays the same


def test_off_is_the_model_itself(host: Any, family: str) -> None:
    model = host.build(family)
    there = with_settings(model, sparse=sparse(), cache=cache(0.2))
    off = with_settings(with_settings(there, sparse=None), cache=None)
    assert off.get_attachment(KEY) is None
    assert not any(KEY in keyed for keyed in off.wrappers.values())
    assert torch.equal(sample(host, off, family), sample(host, model, family))
    assert report_on(off).startswith("DiT-Accel is off")


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "apart"])
def test_everything_read_by_the_kernel_is_dense(host: Any, family: str, together: bool) -> None:
    model = host.build(family)
    full = with_settings(model, sparse=sparse(keep=1.0))
    out = sample(host, full, family, LARGE, together=together)
    torch.testing.assert_close(out, sample(host, model, family, LARGE, together=together), rtol=1e-4, atol=1e-4)
    assert report_of(full).sparse_calls > 0
    assert report_of(full).dense_calls == 0


@pytest.mark.parametrize("family", ["wan", "flux", "sd3"])  # the core's HunyuanVideo takes even edges alone
def test_edges_that_are_no_whole_patches(host: Any, family: str) -> None:
    model, odd = host.build(family), (2, 17, 15)
    full = with_settings(model, sparse=sparse(keep=1.0))
    out = sample(host, full, family, odd)
    torch.testing.assert_close(out, sample(host, model, family, odd), rtol=1e-4, atol=1e-4)
    assert report_of(full).dense_calls == 0


def test_a_cache_that_computes_everything_changes_no_bit(host: Any, family: str) -> None:
    model = host.build(family)
    all_computed = with_settings(model, cache=cache(0.0))
    assert torch.equal(sample(host, all_computed, family), sample(host, model, family))
    assert report_of(all_computed).forwards == {"computed": 6}


def test_dense_calls_are_comfyuis_own_by_the_bit(host: Any, family: str) -> None:
    model = host.build(family)
    dense = with_settings(model, sparse=sparse(dense_first=1.0))
    assert torch.equal(sample(host, dense, family), sample(host, model, family))
    assert report_of(dense).dense_calls > 0
    assert report_of(dense).sparse_calls == 0


def test_the_model_given_is_left_alone(host: Any, family: str) -> None:
    model = host.build(family)
    before = sample(host, model, family)
    patched = with_settings(model, sparse=sparse())
    assert not torch.equal(sample(host, patched, family), before)
    assert torch.equal(sample(host, model, family), before)
    assert model.model_options == {"transformer_options": {}}
    assert patched.model_options == {"transformer_options": {}}


# -- what is sparse


def test_each_layer_is_sparse_once_in_a_forward(host: Any, family: str) -> None:
    seen: list[int] = []
    watched = put_settings(
        host.build(family), Settings(sparse=sparse()), lambda call, *rest: seen.append(call.layer)
    )
    sample(host, watched, family, steps=2)
    layers = Counter(seen)
    assert len(layers) in LAYERS[family]
    assert set(layers) == set(range(len(layers)))
    assert set(layers.values()) == {2}
    assert not report_of(watched).fallbacks


def test_rows_of_a_batch_are_as_by_themselves(host: Any, family: str) -> None:
    model = with_settings(host.build(family), sparse=sparse(keep=0.3))
    together = sample(host, model, family)
    torch.testing.assert_close(together, sample(host, model, family, together=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [name for name in method_choices() if name != "off"])
def test_every_method_offered_runs(host: Any, method: str) -> None:
    keeps = method not in ("clear", "lite", "neighborhood", "radial")
    options = sparse_options(method, 0.4 if keeps else 0.0, 0.0, "", False, "min_tokens = 0\nblock = 16")
    model = with_settings(host.build("wan"), sparse=options)
    out = sample(host, model, "wan", LARGE, steps=3)
    assert torch.isfinite(out).all()
    assert report_of(model).sparse_calls > 0
    assert not report_of(model).fallbacks


def test_padding_of_a_prompt_is_left_out(host: Any) -> None:
    """A mask as HunyuanVideo's text encoder gives it: what it keeps out changes nothing."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    masked = host.conditioning("hunyuan", 1, attention_mask=mask), host.conditioning("hunyuan", 2, attention_mask=mask)
    model = host.build("hunyuan")
    full = with_settings(model, sparse=sparse(keep=1.0))
    out = sample(host, full, "hunyuan", together=False, prompts=masked)
    dense = sample(host, model, "hunyuan", together=False, prompts=masked)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
    assert report_of(full).dense_calls == 0


def test_a_mask_that_is_no_padding_runs_dense_and_says_so(host: Any) -> None:
    mask = torch.tensor([[1, 0, 1, 1, 1, 0, 1]])
    masked = host.conditioning("hunyuan", 1, attention_mask=mask), host.conditioning("hunyuan", 2, attention_mask=mask)
    model = host.build("hunyuan")
    asked = with_settings(model, sparse=sparse())
    out = sample(host, asked, "hunyuan", together=False, prompts=masked)
    assert torch.equal(out, sample(host, model, "hunyuan", together=False, prompts=masked))
    assert set(report_of(asked).fallbacks) == {"an attention mask"}


# -- samplings, branches, breaks


@pytest.mark.parametrize("method, more", [("lite", ""), ("pooled", "predict_every = 3")], ids=["memory", "kept plans"])
def test_samplings_of_one_model_are_strangers(host: Any, family: str, method: str, more: str) -> None:
    """ComfyUI keeps a patched model and samples with it again, at another size perhaps."""
    options = sparse(method, 0.0 if method == "lite" else 0.35, more=more)
    used = with_settings(host.build(family), sparse=options, cache=cache(0.2))
    sample(host, used, family, SMALL)
    fresh = with_settings(host.build(family), sparse=options, cache=cache(0.2))
    assert torch.equal(sample(host, used, family, LARGE), sample(host, fresh, family, LARGE))
    again, first = report_of(used), report_of(fresh)
    assert again == first
    assert again.runs == 1
    assert patch_on(used).samplings == 2


def test_a_sampling_after_one_that_broke_off_is_as_the_first(host: Any) -> None:
    parts = dict(sparse=sparse("lite", 0.0), cache=cache(0.2, "schedule = '110101'"))
    used = with_settings(host.build("wan"), **parts)
    broken = used.clone()
    calls = []

    def stop(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return executor(*args, **kwargs)

    broken.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        sample(host, broken, "wan")
    fresh = with_settings(host.build("wan"), **parts)
    assert torch.equal(sample(host, used, "wan"), sample(host, fresh, "wan"))
    assert report_of(used) == report_of(fresh)


def test_prompts_apart_do_not_see_each_others_cache(host: Any, family: str) -> None:
    kept = "warmup = 1\nschedule = '101010'"
    model = with_settings(host.build(family), cache=cache(0.2, kept))
    apart = sample(host, model, family, together=False)
    assert report_of(model).forwards == {"computed": 6, "reused": 6}
    torch.testing.assert_close(apart, sample(host, model, family), rtol=1e-4, atol=1e-4)
    assert report_of(model).forwards == {"computed": 3, "reused": 3}


def test_a_cache_leaves_steps_out_of_sparse_attention_too(host: Any, family: str) -> None:
    model = with_settings(host.build(family), sparse=sparse(), cache=cache(0.2, "schedule = '110100'"))
    sample(host, model, family)
    alone = with_settings(host.build(family), sparse=sparse())
    sample(host, alone, family)
    assert report_of(model).forwards == {"computed": 3, "reused": 3}
    assert 2 * report_of(model).sparse_calls == report_of(alone).sparse_calls


# -- beside other nodes


class Other:
    """An override of another node, which counts what comes to it and attends as was."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Other:
        return self  # as a function


def _set_before(model: Any, other: Other) -> Any:
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = other
    return with_settings(model, sparse=sparse(dense_first=0.5))


def _set_behind(model: Any, other: Other) -> Any:
    model = with_settings(model, sparse=sparse(dense_first=0.5)).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = other
    return model


def _set_while_sampling(model: Any, other: Other) -> Any:
    model = with_settings(model, sparse=sparse(dense_first=0.5)).clone()

    def install(patcher: Any, timestep: Any, options: dict | None = None) -> None:
        patcher.model_options["transformer_options"]["optimized_attention_override"] = other

    def around(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, **given: Any) -> Any:
        options["optimized_attention_override"] = other  # the last that comes before us
        return executor(x, t, concat, text, control, options, **given)

    model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "other", install)
    inner = model.wrappers[WrappersMP.APPLY_MODEL].pop(KEY)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", around)
    model.wrappers[WrappersMP.APPLY_MODEL][KEY] = inner
    return model


@pytest.mark.parametrize("stack", [_set_before, _set_behind, _set_while_sampling], ids=lambda f: f.__name__[5:])
def test_another_override_gets_all_that_is_not_sparse(host: Any, family: str, stack: Any) -> None:
    other, alone = Other(), with_settings(host.build(family), sparse=sparse(dense_first=0.5))
    both = stack(host.build(family), other)
    assert torch.equal(sample(host, both, family), sample(host, alone, family))
    report, expected = report_of(both), report_of(alone)
    assert report.sparse_calls == expected.sparse_calls > 0
    assert other.calls == report.dense_calls + report.cross_attention_calls > 0
    assert all("another override" in name for name in report.dense_kernels)


def test_an_override_that_takes_our_place_within_the_model_is_told_of(host: Any) -> None:
    model, other = with_settings(host.build("wan"), sparse=sparse()), Other()

    def around(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, **given: Any) -> Any:
        return executor(x, t, concat, text, control, {**options, "optimized_attention_override": other}, **given)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", around)
    sample(host, model, "wan", steps=2)
    assert other.calls > 0
    assert report_of(model).sparse_calls == 0
    [(reason, calls)] = report_of(model).fallbacks.items()
    assert reason.startswith("its attention did not come to us")
    assert calls == 2 * len(model.model.diffusion_model.blocks)


def test_compiled_models_are_sparse_in_the_same_places(host: Any, family: str) -> None:
    """As the core's TorchCompileModel has it: what runs inside ours is compiled."""
    plain = with_settings(host.build(family), sparse=sparse(dense_first=0.5, more="dense_layers = [1]"))
    expected = sample(host, plain, family, steps=4)
    compiled = with_settings(host.build(family), sparse=sparse(dense_first=0.5, more="dense_layers = [1]"))
    diffusion = compiled.model.diffusion_model
    diffusion.forward = torch.compile(diffusion.forward, backend="eager")
    torch.testing.assert_close(sample(host, compiled, family, steps=4), expected, rtol=1e-4, atol=1e-4)
    assert report_of(compiled).sparse_calls == report_of(plain).sparse_calls > 0
    assert report_of(compiled).dense_reasons == report_of(plain).dense_reasons


def test_an_override_that_leads_back_to_ours_ends(host: Any) -> None:
    """One that was set while ours was in place holds on to it."""
    model, held = with_settings(host.build("wan"), sparse=sparse(dense_first=0.5)), []

    def other(function: Any, *args: Any, **kwargs: Any) -> Any:
        return held[-1](function, *args, **kwargs) if held else function(*args, **kwargs)

    def hold(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, **given: Any) -> Any:
        held.append(options["optimized_attention_override"])
        return executor(x, t, concat, text, control, options, **given)

    expected = sample(host, model, "wan")
    stacked = model.clone()
    stacked.model_options["transformer_options"]["optimized_attention_override"] = other
    stacked.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "hold", hold)
    assert torch.equal(sample(host, stacked, "wan"), expected)
    assert report_of(stacked).sparse_calls == report_of(model).sparse_calls
    assert held


def test_calls_of_no_sampler_are_left_alone(host: Any) -> None:
    model = with_settings(host.build("wan"), sparse=sparse())
    latent, text = host.latents("wan", SMALL)["samples"] + 0.5, host.conditioning("wan")[0][0]
    options = {"wrappers": model.wrappers}
    given = dict(c_crossattn=text, transformer_options=options)
    with torch.no_grad():
        there = model.model.apply_model(latent, torch.tensor([0.5]), **given)
        plain = model.model.apply_model(latent, torch.tensor([0.5]), c_crossattn=text, transformer_options={})
    assert torch.equal(there, plain)
    assert "left alone, because no sampler of ComfyUI ran them: 1 calls" in report_on(model)


@pytest.mark.parametrize(
    "noise, step", [(1.0, 0), (0.9, 1), (0.8, 1), (0.80001, 1), (0.5, 2), (0.2, 3), (0.0, 3)], ids=str
)
def test_the_step_is_how_many_levels_lie_behind(noise: float, step: int) -> None:
    """Also between two of them, where samplers of a higher order look, and where a device rounds."""
    assert sampling_module._step({"sample_sigmas": torch.tensor([1.0, 0.8, 0.5, 0.0])}, noise) == step


# -- what is told


def test_the_report_tells_calls_reasons_and_size(host: Any) -> None:
    model = with_settings(host.build("wan"), sparse=sparse(dense_first=0.5, more="dense_layers = [0]"))
    assert "No sampler has run this model yet" in report_on(model)
    sample(host, model, "wan")
    text = report_on(model)
    assert "sampling 1 of this model: latents [1, " in text and ", 3, 16, 20], 6 steps" in text
    assert "dense because: one of the first 0.5 of the steps" in text
    assert "dense because: dense layer (3)" in text
    assert "no fall-backs" in text
    assert "executor: cpu" in text


def test_strict_stops_where_a_call_would_fall_back(host: Any) -> None:
    mask = torch.tensor([[1, 0, 1, 1, 1, 0, 1]])
    prompt = host.conditioning("hunyuan", 1, attention_mask=mask)
    model = with_settings(host.build("hunyuan"), sparse=sparse(more="strict = true"))
    with pytest.raises(FallbackError, match="an attention mask"):
        sample(host, model, "hunyuan", prompts=(prompt, prompt), together=False)


def test_a_model_that_nobody_described_is_refused(host: Any) -> None:
    model = host.build("wan")
    model.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(UnknownModelError, match="Linear is of no family.*WanModel.*set it to off"):
        with_settings(model, sparse=sparse())


def test_layers_that_are_not_there_are_refused(host: Any) -> None:
    model = with_settings(host.build("wan"), sparse=sparse(more="dense_layers = [40]"))
    with pytest.raises(UsageError, match="dense_layers names layer 40"):
        sample(host, model, "wan")


def test_a_model_that_predicts_no_velocity_is_not_cached(host: Any) -> None:
    model = host.build("wan")
    cached = with_settings(model, cache=cache(0.2))
    before = sample(host, model, "wan")
    model.model.model_sampling = without_velocity(model.model.model_sampling)
    assert torch.equal(sample(host, cached, "wan"), before)
    assert report_of(cached).forwards == {"computed": 6}
    [reason] = report_of(cached).computed_reasons
    assert reason == "the model predicts no velocity, and caches are for those that do"


def without_velocity(sampling: Any) -> Any:
    """Something that does the same and does not say that it predicts a velocity."""

    class Unsaid(torch.nn.Module):
        def __getattr__(self, name: str) -> Any:
            return getattr(sampling, name)

    return Unsaid()
