"""Region sampling in ComfyUI: what a part of the tokens comes to, when it is, and when every token is computed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.patcher_extension import WrappersMP
from plain_region import Plain, predicted, region_of, watch
from running import LARGE, SMALL, cache, region, report_of, sample, sparse, with_settings
from test_pack import Other, without_velocity

from dit_accel.errors import UsageError
from dit_accel.integrations.comfyui.families import FAMILIES, find_family
from dit_accel.integrations.comfyui.nodes.region import RegionNode
from dit_accel.integrations.comfyui.patch import KEY, patch_on, put_settings, report_on
from dit_accel.integrations.comfyui.settings import Settings, settings_of_preset
from dit_accel.region import Region
from dit_accel.region.choose import choose, measure


def grid_of(family: str, size: tuple[int, int, int], host: Any) -> tuple[int, int, int]:
    return (size[0] if family in host.VIDEO else 1, -(-size[1] // 2), -(-size[2] // 2))


def plainly(host: Any, family: str, size: tuple[int, int, int], seen: Any, kept: Any = None, **more: Any) -> Any:
    """What the model comes to, said plainly, where it computes the tokens that were seen."""
    plain = Plain(seen, grid_of(family, size, host), kept, text_first=family != "hunyuan")
    return sample(host, plain.on(host.build(family)), family, size, **more)


def count_of(seen: Any) -> list[int | None]:
    return [None if index is None else index.shape[1] for _, index in seen]


# -- what a part comes to


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "apart"])
def test_a_part_is_what_it_says(host: Any, family: str, together: bool) -> None:
    model, seen = watch(with_settings(host.build(family), region=region()))
    out = sample(host, model, family, LARGE, together=together)
    tokens = 5 * 63 if family in host.VIDEO else 63
    part = -(-tokens * 4 // 80) * 8
    branches = 1 if together else 2
    assert count_of(seen) == [None] * branches + [part] * 4 * branches + [None] * branches
    torch.testing.assert_close(out, plainly(host, family, LARGE, seen, together=together), rtol=1e-4, atol=1e-4)
    assert report_of(model).regions == {
        f"{tokens} of {tokens} tokens": 2 * branches, f"{part} of {tokens} tokens": 4 * branches
    }  # fmt: skip
    assert not torch.allclose(out, sample(host, host.build(family), family, LARGE), atol=1e-2)


def test_each_picture_has_tokens_of_its_own(host: Any, family: str) -> None:
    model, seen = watch(with_settings(host.build(family), region=region(0.3)))
    out = sample(host, model, family, pictures=2)
    index = seen[2][1]
    assert index.shape[0] == 2 and not torch.equal(index[0], index[1])
    torch.testing.assert_close(out, plainly(host, family, SMALL, seen, pictures=2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["wan", "flux", "sd3"])  # the core's HunyuanVideo takes even edges alone
def test_edges_that_are_no_whole_patches(host: Any, family: str) -> None:
    odd = (2, 17, 15)
    model, seen = watch(with_settings(host.build(family), region=region()))
    out = sample(host, model, family, odd)
    assert count_of(seen)[1] is not None
    torch.testing.assert_close(out, plainly(host, family, odd, seen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more, kept", [('keys = "drop"', set()), ("layers = 1", {-1})], ids=["none", "last"])
def test_keys_of_some_layers_alone(host: Any, family: str, more: str, kept: set[int]) -> None:
    model, seen = watch(with_settings(host.build(family), region=region(more=more)))
    out = sample(host, model, family)
    diffusion = model.model.diffusion_model
    slots = find_family(diffusion).slots(diffusion)
    kept = {layer % sum(map(len, slots.values())) for layer in kept}
    torch.testing.assert_close(out, plainly(host, family, SMALL, seen, kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["raster", "gilbert"])
def test_blocks_beside_sparse_attention(host: Any, family: str, order: str) -> None:
    """What reads everything through the sparse kernel is the same, and its parts attend sparsely, too."""
    everything = sparse(keep=1.0, more=f'order = "{order}"')
    model, seen = watch(with_settings(host.build(family), sparse=everything, region=region(unit="block")))
    out = sample(host, model, family, LARGE)
    assert all(count is not None for count in count_of(seen)[1:-1])
    torch.testing.assert_close(out, plainly(host, family, LARGE, seen), rtol=1e-4, atol=1e-4)
    report = report_of(model)
    assert report.sparse_calls > 0 and report.dense_calls == 0


def test_sparse_attention_of_whole_steps_stays(host: Any, family: str) -> None:
    """Parts of single tokens attend densely, for a reason, to keys that sparse steps left in another order."""
    everything = sparse(keep=1.0, more='order = "gilbert"')
    model, seen = watch(with_settings(host.build(family), sparse=everything, region=region()))
    out = sample(host, model, family)
    torch.testing.assert_close(out, plainly(host, family, SMALL, seen), rtol=1e-4, atol=1e-4)
    report = report_of(model)
    assert 2 * report.sparse_calls == report.dense_calls > 0  # two whole steps, four of a part
    assert report.dense_reasons == {"region sampling: the queries are a part of the tokens": report.dense_calls}
    assert not report.fallbacks


def test_a_prompts_padding_stays_out_of_a_part(host: Any) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    masked = host.conditioning("hunyuan", 1, attention_mask=mask), host.conditioning("hunyuan", 2, attention_mask=mask)
    model, seen = watch(with_settings(host.build("hunyuan"), region=region()))
    out = sample(host, model, "hunyuan", together=False, prompts=masked)
    assert count_of(seen)[2] is not None
    expected = plainly(host, "hunyuan", SMALL, seen, together=False, prompts=masked)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_frames_with_noise_levels_of_their_own(host: Any) -> None:
    """As Wan 2.2's 5B model has them, where the first frame is given."""
    family, mask = host.BY_FRAME, torch.ones(1, 1, *LARGE)
    mask[:, :, 0] = 0
    model, seen = watch(with_settings(host.build(family), region=region()))
    out = sample(host, model, family, LARGE, mask=mask)
    assert count_of(seen)[1] is not None
    torch.testing.assert_close(out, plainly(host, family, LARGE, seen, mask=mask), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, sample(host, model, family, LARGE), atol=1e-2)


def test_a_prompt_as_long_as_the_part(host: Any) -> None:
    """Cross-attention then looks like self-attention."""
    prompts = host.conditioning("wan", 1, tokens=96), host.conditioning("wan", 2, tokens=96)
    model, seen = watch(with_settings(host.build("wan"), region=region()))
    out = sample(host, model, "wan", prompts=prompts)
    assert count_of(seen)[1:-1] == [96] * 4
    torch.testing.assert_close(out, plainly(host, "wan", SMALL, seen, prompts=prompts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selector", ["std", "l2"])
def test_tokens_are_chosen_by_the_guided_velocity(host: Any, family: str, selector: str) -> None:
    model, seen = watch(with_settings(host.build(family), region=region(selector=selector)))
    model, velocities = predicted(model)
    sample(host, model, family)
    grid = grid_of(family, SMALL, host)
    left_out = torch.zeros(1, grid[0] * grid[1] * grid[2], dtype=torch.int32)
    for step in range(4):
        velocity = velocities[step][0]
        video = velocity if velocity.ndim == 5 else velocity[:, :, None]
        tokens = [
            video[:, :, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(2).transpose(1, 2)
            for f in range(grid[0])
            for r in range(grid[1])
            for c in range(grid[2])
        ]
        index = seen[step + 1][1]
        expected = choose(measure(torch.stack(tokens, 1), selector), left_out, index.shape[1], 0.0, 1.0)
        assert torch.equal(index, expected)
        left_out = (left_out + 1).scatter(1, index, 0)


# -- off


def test_off_is_the_model_itself(host: Any, family: str) -> None:
    model = host.build(family)
    [off] = RegionNode.execute(model, "off", 0.5, "token", "").args
    [everything] = RegionNode.execute(model, "std", 1.0, "token", "").args
    for patched in (off, everything):
        assert patched.get_attachment(KEY) is None
        assert not any(KEY in keyed for keyed in patched.wrappers.values())
        assert torch.equal(sample(host, patched, family), sample(host, model, family))


def test_a_part_of_everything_changes_no_bit(host: Any, family: str) -> None:
    model = host.build(family)
    everything = put_settings(model, Settings(region=Region(sample_ratio=1.0)))
    assert torch.equal(sample(host, everything, family), sample(host, model, family))
    [(size, count)] = report_of(everything).regions.items()
    assert count == 6 and size.split()[0] == size.split()[2]


def test_the_node_says_what_the_engine_is_asked(host: Any) -> None:
    [model] = RegionNode.execute(host.build("wan"), "change", 0.25, "token", 'keys = "drop"\nstart = 3').args
    asked = patch_on(model).settings.region
    assert (asked.selector, asked.sample_ratio, asked.unit) == ("change", 0.25, "token")
    assert (asked.keys, asked.start) == ("drop", 3)
    with pytest.raises(UsageError, match="one transformer"):
        RegionNode.execute(model, "std", 0.5, "token", "[transformer_2]\nsample_ratio = 0.3")
    with pytest.raises(UsageError, match="selector='mask' needs a mask"):
        RegionNode.execute(model, "std", 0.5, "token", 'selector = "mask"')


# -- when every token is computed

_STANDS_IN = "another node stands in for blocks"
_AGAIN = "the branch comes a second time at this step"


def _all_computed(host: Any, family: str, patched: Any, plain: Any, reason: str, **more: Any) -> None:
    """Nothing but ComfyUI's own ran, to the bit, and the report says why."""
    expected = sample(host, plain, family, **more)
    assert torch.equal(sample(host, patched, family, **more), expected)
    reasons = report_of(patched).whole_reasons
    assert sum(count for said, count in reasons.items() if reason in said) == sum(report_of(patched).regions.values())
    assert reason in report_on(patched)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_samplers_that_look_twice_or_back(host: Any, family: str, sampler: str) -> None:
    model = host.build(family)
    patched = with_settings(model, region=region())
    _all_computed(host, family, patched, model, f"sampler {sampler}: only euler is known", sampler=sampler)


def test_a_sampler_that_adds_noise(host: Any) -> None:
    model = with_settings(host.build("wan"), region=region())
    sample(host, model, "wan", sampler=comfy.samplers.KSAMPLER(sample_euler, {"s_churn": 0.5}))
    assert set(report_of(model).whole_reasons) == {"sampler euler adds noise (s_churn)"}


def _with_around(model: Any, change: Any) -> Any:
    """A wrapper before ours, that gives it something else."""
    model = model.clone()
    ours = model.wrappers.get(WrappersMP.APPLY_MODEL, {}).pop(KEY, None)

    def around(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, **given: Any) -> Any:
        return change(executor, x, t, concat, text, control, options, given)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "around", around)
    if ours is not None:
        model.wrappers[WrappersMP.APPLY_MODEL][KEY] = ours
    return model


def _control(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, given: dict) -> Any:
    image = torch.full((len(x), 80, 64 if x.shape[1] == 16 else 32), 0.1)
    return executor(x, t, concat, text, {"input": [image], "output": []}, options, **given)


def test_a_controlnet(host: Any) -> None:
    model = host.build("flux")
    patched = _with_around(with_settings(model, region=region()), _control)
    _all_computed(host, "flux", patched, _with_around(model, _control), "a ControlNet comes in")


def _halves(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, given: dict) -> Any:
    halves = x.chunk(2, dim=-1)
    return torch.cat([executor(half, t, concat, text, control, {**options}, **given) for half in halves], dim=-1)


def test_a_part_of_the_latents(host: Any, family: str) -> None:
    """As nodes that go through a picture tile by tile have it."""
    model = host.build(family)
    patched = _with_around(with_settings(model, region=region()), _halves)
    _all_computed(host, family, patched, _with_around(model, _halves), "a part of the latents")


class _Window:
    index_list = (0, 1)


def _window(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, given: dict) -> Any:
    return executor(x, t, concat, text, control, {**options, "context_window": _Window()}, **given)


def test_context_windows(host: Any) -> None:
    model = host.build("wan")
    _all_computed(
        host, "wan", _with_around(with_settings(model, region=region()), _window), model, "a context window"
    )


def _pass_on(args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return more["original_block"](args)


def _stand_in(model: Any) -> Any:
    model = model.clone()
    model.model_options["transformer_options"]["patches_replace"] = {"dit": {("double_block", 0): _pass_on}}
    return model


def _patch_tokens(model: Any) -> Any:
    model = model.clone()
    model.model_options["transformer_options"]["patches"] = {"post_input": [lambda tokens: tokens]}
    return model


def _stand_around(model: Any) -> Any:
    model = model.clone()
    pass_on = lambda executor, *args, **given: executor(*args, **given)  # noqa: E731
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", pass_on)
    return model


def _replace_forward(model: Any) -> Any:
    model = model.clone()
    diffusion = model.model.diffusion_model
    diffusion._forward = functools.partial(type(diffusion)._forward, diffusion)
    return model


@pytest.mark.parametrize(
    "change, reason",
    [
        (_stand_in, _STANDS_IN),
        (_patch_tokens, "another node patches tokens"),
        (_stand_around, "another node stands around the model"),
        (_replace_forward, "another node replaced the model's forward"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("first", ["region", "other"])
def test_nodes_that_change_the_model_within(host: Any, change: Any, reason: str, first: str) -> None:
    model = host.build("wan")
    if first == "region":
        patched = change(with_settings(model, region=region()))
    else:
        patched = with_settings(change(model), region=region())
    _all_computed(host, "wan", patched, host.build("wan"), reason)


@pytest.mark.parametrize(
    "name, given, reason",
    [
        ("WanModel", {"time_dim_concat": torch.zeros(1)}, "frames are appended to the latents"),
        ("WanModel", {"reference_latent": torch.zeros(1)}, "a reference image"),
        ("Flux", {"ref_latents": [torch.zeros(1)]}, "reference images"),
        ("Flux", {"attention_mask": torch.zeros(1)}, "an attention mask"),
        ("HunyuanVideo", {"ref_latent": torch.zeros(1)}, "a reference image"),
        ("HunyuanVideo", {"guiding_frame_index": torch.zeros(1)}, "the first frame is modulated by itself"),
        ("HunyuanVideo", {"clip_fea": torch.zeros(1)}, "an image's tokens stand among the text"),
    ],
)
def test_conditioning_that_is_no_plain_grid(name: str, given: dict[str, Any], reason: str) -> None:
    model = torch.nn.Module()
    assert FAMILIES[name].why_whole(model, given) == reason
    assert FAMILIES[name].why_whole(model, dict.fromkeys(given)) is None


def test_a_model_that_predicts_no_velocity(host: Any) -> None:
    model = host.build("wan")
    patched, before = with_settings(model, region=region()), sample(host, model, "wan")
    model.model.model_sampling = without_velocity(model.model.model_sampling)
    assert torch.equal(sample(host, patched, "wan"), before)
    assert set(report_of(patched).whole_reasons) == {"the model predicts no velocity that could be held"}


def test_a_branch_that_was_away_computes_every_token(host: Any) -> None:
    """As prompts do that hold for some of the steps alone."""
    model, seen = watch(with_settings(host.build("wan"), region=region()))
    step = []

    def guide(executor: Any, *args: Any, **kwargs: Any) -> Any:
        executor.class_obj.cfg = 1.0 if len(step) in (2, 3) else 4.0
        step.append(1)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "guide", guide)
    out = sample(host, model, "wan", together=False, steps=8)
    whole = [(prompts, index is None) for prompts, index in seen]
    by_step = {kind: [is_whole for prompts, is_whole in whole if prompts == (kind,)] for kind in (0, 1)}
    assert by_step[0] == [True] + [False] * 6 + [True]
    assert by_step[1] == [True, False, True, False, False, True]  # of steps 0, 1, 4, 5, 6, 7
    assert report_of(model).whole_reasons["the branch was away for a step"] == 1
    step.clear()
    plain = Plain(seen, grid_of("wan", SMALL, host)).on(host.build("wan"))
    plain.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "guide", guide)
    torch.testing.assert_close(out, sample(host, plain, "wan", together=False, steps=8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"patches_replace": {"dit": {("double_block", 1): lambda args, more: args}}}, _STANDS_IN),
        ({"optimized_attention_override": lambda f, q, *args, **more: f(q / 2, *args, **more)}, _AGAIN),
    ],
    ids=["layer left out", "attention blurred"],
)
def test_a_forward_more_in_a_step_is_nobodys_memory(host: Any, family: str, changed: Any, reason: str) -> None:
    """As nodes have it that guide by a worse model: of the same prompt, at the same step."""

    def twice(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, given: dict) -> Any:
        out = executor(x, t, concat, text, control, {**options}, **given)
        executor(x, t, concat, text, control, {**options, **changed}, **given)
        return out

    model = with_settings(host.build(family), region=region())
    expected = sample(host, model, family, steps=8)
    assert torch.equal(sample(host, _with_around(model, twice), family, steps=8), expected)
    assert report_of(model).whole_reasons[reason] == 8


# -- what cannot be


def test_classes_that_nobody_described_are_refused(host: Any) -> None:
    model = host.build("wan")
    diffusion = model.model.diffusion_model
    diffusion.__class__ = type("VaceWanModel", (type(diffusion),), {})
    patched = with_settings(model, region=region())
    with pytest.raises(UsageError, match="not proven for VaceWanModel in ComfyUI.*Region to off.*Flux.*WanModel"):
        sample(host, patched, "wan")


def test_layers_and_blocks_that_there_are_not(host: Any) -> None:
    with pytest.raises(UsageError, match="layers=40, but WanModel has"):
        sample(host, with_settings(host.build("wan"), region=region(more="layers = 40")), "wan")
    with pytest.raises(UsageError, match="unit='block' chooses blocks of sparse attention, and there is none"):
        sample(host, with_settings(host.build("wan"), region=region(unit="block")), "wan")


def test_memory_that_is_not_there(host: Any) -> None:
    model = with_settings(host.build("wan"), region=region(more="memory = 0.0001"))
    with pytest.raises(UsageError, match="Region sampling would keep .* GiB for 1 branch"):
        sample(host, model, "wan")


def test_what_takes_our_blocks_away_stops_the_run(host: Any, family: str) -> None:
    """Never a part of the tokens for the whole."""
    model = with_settings(host.build(family), region=region())

    def within(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, **given: Any) -> Any:
        return executor(x, t, concat, text, control, {**options, "patches_replace": {}}, **given)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "within", within)
    with pytest.raises(UsageError, match="could not take its tokens out: 0 of .* blocks.*set DiT-Accel Region to off"):
        sample(host, model, family)


def test_another_override_within_the_model_leaves_nothing_to_keep(host: Any) -> None:
    model = host.build("wan")
    patched, other = with_settings(model, region=region()), Other()

    def within(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, **given: Any) -> Any:
        return executor(x, t, concat, text, control, {**options, "optimized_attention_override": other}, **given)

    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "within", within)
    assert torch.equal(sample(host, patched, "wan"), sample(host, model, "wan"))
    assert report_of(patched).whole_reasons["nothing is kept of this branch yet"] == 4


# -- samplings, breaks, memory


def test_samplings_of_one_model_are_strangers(host: Any, family: str) -> None:
    parts = dict(sparse=sparse(), region=region(), cache=cache(0.2, "schedule = '110111'"))
    used = with_settings(host.build(family), **parts)
    sample(host, used, family, SMALL)
    fresh = with_settings(host.build(family), **parts)
    assert torch.equal(sample(host, used, family, LARGE), sample(host, fresh, family, LARGE))
    assert report_of(used) == report_of(fresh)
    assert len(report_of(used).regions) == 2 and report_of(used).forwards["reused"] == 1


def test_a_sampling_after_one_that_broke_off_is_as_the_first(host: Any, family: str) -> None:
    used = with_settings(host.build(family), region=region())
    broken, calls = used.clone(), []

    def stop(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return executor(*args, **kwargs)

    broken.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "stop", stop)
    with pytest.raises(KeyboardInterrupt):
        sample(host, broken, family)
    fresh = with_settings(host.build(family), region=region())
    assert torch.equal(sample(host, used, family), sample(host, fresh, family))
    assert report_of(used) == report_of(fresh)


def test_what_is_declared_is_what_is_kept(host: Any, family: str) -> None:
    model, held = with_settings(host.build(family), region=region()).clone(), []

    def look(executor: Any, x: Any, t: Any, concat: Any, text: Any, control: Any, options: dict, **given: Any) -> Any:
        ours = region_of(options)
        held.append((ours.bytes_held(), ours.needs()[1]))
        return executor(x, t, concat, text, control, options, **given)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "look", look)
    sample(host, model, family, together=False)
    declared = held[0][1]
    assert declared > 0
    expected = [0, declared, *[2 * declared] * 8, declared, 0]  # the last step lets go of it
    assert held == [(kept, declared) for kept in expected]


def test_prompts_apart_are_as_together(host: Any, family: str) -> None:
    model = with_settings(host.build(family), region=region())
    together = sample(host, model, family)
    torch.testing.assert_close(together, sample(host, model, family, together=False), rtol=1e-4, atol=1e-4)


# -- beside others


def test_another_override_gets_what_is_dense(host: Any, family: str) -> None:
    alone, other = with_settings(host.build(family), region=region()), Other()
    both = with_settings(host.build(family), region=region()).clone()
    both.model_options["transformer_options"]["optimized_attention_override"] = other
    assert torch.equal(sample(host, both, family), sample(host, alone, family))
    report = report_of(both)
    assert other.calls == report.dense_calls + report.cross_attention_calls > 0
    assert report.regions == report_of(alone).regions


def test_a_cache_leaves_steps_out_in_between(host: Any, family: str) -> None:
    """Tokens count as left out then, and the next part is of the velocity that was made up."""
    model, seen = watch(with_settings(host.build(family), region=region(), cache=cache(0.2, "schedule = '11011011'")))
    sample(host, model, family, steps=8)
    assert report_of(model).forwards == {"computed": 6, "reused": 2}
    assert [count is None for count in count_of(seen)] == [True, False, False, False, False, True]


def test_compiled_models_compute_the_same_tokens(host: Any, family: str) -> None:
    plain = with_settings(host.build(family), region=region())
    expected = sample(host, plain, family)
    compiled = with_settings(host.build(family), region=region())
    diffusion = compiled.model.diffusion_model
    diffusion.forward = torch.compile(diffusion.forward, backend="eager")
    torch.testing.assert_close(sample(host, compiled, family), expected, rtol=1e-4, atol=1e-4)
    assert report_of(compiled).regions == report_of(plain).regions


def test_a_presets_region_table_acts(host: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'version = 1\n[own]\nextends = "wan21-dense"\ndescription = "Mine"\nlevel = "fast"\n'
        '[own.sparse]\nmethod = "pooled"\nkeep = 1.0\nmin_tokens = 0\nblock = 16\n'
        "[own.region]\nsample_ratio = 0.4\nbucket = 8\nstart = 1\n"
    )
    settings = settings_of_preset(str(file), host.build("wan"))
    model = put_settings(host.build("wan"), settings)
    sample(host, model, "wan")
    assert report_of(model).regions["96 of 240 tokens"] > 0
    assert report_of(model).sparse_calls > 0
