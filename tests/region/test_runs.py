"""Whole runs of pipelines under region sampling: what they give, what they keep, and what becomes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

import dit_accel
from dit_accel.errors import UsageError
from dit_accel.testing import peak_bytes, tiny_hunyuan_video_with_text, tiny_wan_pipeline

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
}
REGION = {"sample_ratio": 0.5, "bucket": 8, "start": 2, "error_reset": (4,)}  # of 48 tokens, in 7 steps
STEPS = 7


def make(scheduler: str = "unipc", **more: Any) -> Any:
    pipe = tiny_wan_pipeline(**more)
    pipe.scheduler = SCHEDULERS[scheduler]()
    return pipe


def sample(pipe: Any, *, prompt: Any = "a star", seed: int = 0, steps: int = STEPS, **call: Any) -> Tensor:
    own = {"height": 64, "width": 96, "num_frames": 5, "guidance_scale": 4.0}  # 2 x 4 x 6 tokens
    given = {**own, "num_inference_steps": steps, "output_type": "latent", **call}
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **given).frames


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_asking_for_every_token_is_no_region_sampling(scheduler):
    pipe = make(scheduler)
    dense = sample(pipe)
    with dit_accel.accelerate(pipe, region={**REGION, "sample_ratio": 1.0}) as handle:
        assert torch.equal(sample(pipe), dense)
        report = handle.report()
    assert report.whole_reasons == {"every token is asked for": 2 * STEPS} and report.bytes_region == 0
    assert torch.equal(sample(pipe), dense)


@pytest.mark.parametrize("keys", ["cached", "drop"])
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_runs_are_equal_and_nothing_is_left_of_them(scheduler, keys):
    pipe = make(scheduler)
    dense = sample(pipe)
    handle = dit_accel.accelerate(pipe, region={**REGION, "keys": keys})
    first = sample(pipe)
    assert not torch.equal(first, dense) and torch.equal(sample(pipe), first)
    assert handle.report().runs == 2
    handle.remove()
    assert torch.equal(sample(pipe), dense)


CALLS = [{"prompt": "a ring"}, {"steps": 5}, {"width": 64}, {"prompt": ["a", "b"]}, {"guidance_scale": 1.0}]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_runs_are_strangers(call):
    """Run B behind run A is run B alone, and the other way round."""
    pipe, other = make(), make()
    for one in (pipe, other):
        dit_accel.accelerate(one, region=REGION)
    first, alone = sample(pipe), sample(other, **call)
    assert torch.equal(sample(pipe, **call), alone) and torch.equal(sample(other), first)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("where", ["first branch", "second branch", "scheduler"])
def test_a_run_behind_one_that_broke_off_is_a_fresh_one(where, at):
    pipe = make()
    dit_accel.accelerate(pipe, region=REGION)
    fresh = sample(pipe)

    class Stop(Exception):
        pass

    forwards = 0

    def stop(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 2 * at + (1 if where == "first branch" else 2):
            raise Stop

    def stop_behind_step(pipe: Any, step: int, time: Any, kwargs: dict) -> dict:
        if where == "scheduler" and step == at:
            raise Stop
        return kwargs

    breaking = pipe.transformer.blocks[1].ffn.register_forward_hook(stop if where != "scheduler" else lambda *_: None)
    with pytest.raises(Stop):
        sample(pipe, prompt="another", seed=5, callback_on_step_end=stop_behind_step)
    breaking.remove()
    assert torch.equal(sample(pipe), fresh)


@pytest.mark.parametrize(("keys", "layers"), [("cached", None), ("cached", 1), ("drop", None)])
def test_what_is_kept_is_what_was_declared(keys, layers):
    pipe = make()
    handle = dit_accel.accelerate(pipe, region={**REGION, "keys": keys, "layers": layers})
    part, held = handle._engines[0].region, []

    def look(pipe: Any, step: int, time: Any, kwargs: dict) -> dict:
        held.append(part.bytes_held())
        return kwargs

    sample(pipe, prompt=["a", "b"], callback_on_step_end=look)
    declared = 2 * part.declare(rows=2, tokens=48, text=0, itemsize=4)
    velocity = 2 * 2 * 48 * 64 * 4
    by_hand = velocity + (0 if keys == "drop" else 2 * 2 * (layers or 2) * 2 * 48 * 24 * 4)
    assert declared == by_hand
    # nothing before it is needed, and nothing once it no longer is
    assert held == [0, *[declared] * (STEPS - 2), 0]
    report = handle.report()
    assert report.bytes_region == declared + 2 * 48 * 4 + 2 * 24 * 8 and report.bytes_held <= 2 * 48 * 4


def test_peak_memory_is_the_dense_one_and_what_is_declared():
    pipe = make(transformer={"num_layers": 8})
    text = torch.randn(2, 1, 12, 32)  # the text encoder's peak would hide that of the transformer
    call = {"height": 128, "width": 160, "prompt": None, "prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    sample(pipe, **call)
    dense, _ = peak_bytes(lambda: sample(pipe, **call))
    handle = dit_accel.accelerate(pipe, region={**REGION, "bucket": 64})
    sample(pipe, **call)
    peak, _ = peak_bytes(lambda: sample(pipe, **call))
    report = handle.report()
    assert report.bytes_region > 0.1 * dense
    assert dense < peak  # or there would be nothing to declare
    assert peak <= (dense + report.bytes_held + report.bytes_region) * 1.02


def test_what_does_not_fit_is_refused_before_it_is_kept():
    pipe = make()
    own = sample(pipe)
    one = 48 * 64 * 4 + 2 * 2 * 48 * 24 * 4  # a branch
    for branches, guidance in ((1, 1.0), (2, 4.0)):
        handle = dit_accel.accelerate(pipe, region={**REGION, "memory": (branches * one + 8) / 2**30})
        sample(pipe, guidance_scale=guidance)
    handle = dit_accel.accelerate(pipe, region={**REGION, "memory": (2 * one - 8) / 2**30})
    steps: list[int] = []
    with pytest.raises(UsageError, match=r"keep 5\.72e-05 GiB for 2 branch.*keys='drop'.*layers="):
        sample(pipe, callback_on_step_end=lambda pipe, step, time, kwargs: steps.append(step) or kwargs)
    assert not steps and handle._engines[0].region.bytes_held() == 0  # in the first step
    sample(pipe, guidance_scale=1.0)
    dit_accel.accelerate(pipe, region={**REGION, "memory": (2 * one - 8) / 2**30, "keys": "drop"})
    sample(pipe)
    dit_accel.accelerate(pipe, region={**REGION, "memory": 0.0, "sample_ratio": 1.0})  # keeps nothing
    assert torch.equal(sample(pipe), own)


def test_every_forward_is_counted_with_its_reason():
    pipe = make()
    handle = dit_accel.accelerate(pipe, region=REGION)
    sample(pipe)
    report = handle.report()
    assert report.regions == {"48 of 48 tokens": 8, "24 of 48 tokens": 6}
    assert report.whole_reasons == {
        "before region sampling starts": 4, "error reset": 2, "the last step": 2
    }  # fmt: skip
    assert report.dense_reasons == {
        "sparse attention is off": 16, "region sampling: the queries are a part of the tokens": 12
    }  # fmt: skip
    assert report.fallbacks == {} and report.sparse_calls == 0
    assert "forwards with: 24 of 48 tokens (6)" in str(report) and report.to_dict()["regions"] == report.regions


def test_two_experts_keep_apart_and_one_forgets_when_the_other_takes_over():
    pipe = tiny_wan_pipeline(two_experts=True)
    handle = dit_accel.accelerate(pipe, region={**REGION, "start": 1, "error_reset": ()})
    first, second = (engine.region for engine in handle._engines)
    held = []

    def look(pipe: Any, step: int, time: Any, kwargs: dict) -> dict:
        held.append((first.bytes_held() > 0, second.bytes_held() > 0))
        return kwargs

    sample(pipe, callback_on_step_end=look, steps=8)
    switch = held.index((False, True))
    assert 1 < switch < 7 and held[:switch] == [(True, False)] * switch
    reasons = handle.report().whole_reasons
    assert reasons["nothing is kept of this branch yet"] == 2  # the second expert's first step


def test_beside_a_step_cache_and_sparse_attention():
    """easy makes whole forwards up; those that run compute a part of the tokens; those that compute all run sparse."""
    pipe = make()
    cache = {"name": "easy", "schedule": "1110111", "min_steps": 0}
    sparse = dict(method="pooled", keep=0.5, block=16, min_tokens=0)
    handle = dit_accel.accelerate(pipe, region=REGION, cache=cache, **sparse)
    out = sample(pipe)
    assert torch.isfinite(out).all() and torch.equal(sample(pipe), out)
    report = handle.report(clear=True)
    assert report.forwards == {"computed": 24, "reused": 4}
    # steps 0, 1 and 4 and 6 are whole; 3 was made up; 2 and 5 are in part
    assert report.regions == {"48 of 48 tokens": 16, "24 of 48 tokens": 8}
    assert report.sparse_calls == 2 * 16 and report.dense_calls == 2 * 8 and not report.fallbacks


def test_tokens_stay_left_out_where_a_step_is_made_up():
    pipe = make()
    cache = {"name": "easy", "schedule": "1101111", "min_steps": 0}
    handle = dit_accel.accelerate(pipe, region={**REGION, "start": 1, "error_reset": ()}, cache=cache)
    waits = []

    def look(pipe: Any, step: int, time: Any, kwargs: dict) -> dict:
        waits.append(handle._sampler._left_out.unique().tolist())
        return kwargs

    sample(pipe, callback_on_step_end=look)
    assert waits[:3] == [[0], [0, 1], [1, 2]] and waits[-1] == [0]


def test_caches_that_keep_tokens_are_refused():
    pipe = make()
    with pytest.raises(UsageError, match="cache 'first_block' keeps tokens"):
        dit_accel.accelerate(pipe, region=REGION, cache="first_block")
    assert "step" not in vars(pipe.scheduler)


def test_a_model_it_is_not_proven_for_is_left_as_it_was():
    pipe = tiny_hunyuan_video_with_text()
    with pytest.raises(UsageError, match="Region sampling is not proven for HunyuanVideoTransformer3DModel"):
        dit_accel.accelerate(pipe, region=REGION)
    assert "step" not in vars(pipe.scheduler)
    assert not any(hasattr(module, "_dit_accel") for module in pipe.transformer.modules())
    with pytest.raises(UsageError, match=r"layers=3, but WanTransformer3DModel has 2"):
        dit_accel.accelerate(make(), region={**REGION, "layers": 3})


def test_a_processor_set_by_hand_has_every_token_computed():
    pipe = make()
    dense = sample(pipe)
    handle = dit_accel.accelerate(pipe, region=REGION)
    attn = pipe.transformer.blocks[0].attn1
    attn.set_processor(attn._dit_accel.stock)
    assert torch.equal(sample(pipe), dense)
    assert handle.report().whole_reasons == {"a processor was replaced after installation": 2 * STEPS}


def test_it_cannot_be_copied():
    pipe = make()
    dit_accel.accelerate(pipe, region=REGION)
    with pytest.raises(UsageError, match="under region sampling cannot be copied"):
        copy.deepcopy(pipe.transformer)


def test_a_mask_says_what_is_computed():
    pipe = make()
    mask = torch.zeros(2, 4, 6)
    mask[:, 1:3, 2:4] = 1  # 8 tokens of the 24 that may be computed
    handle = dit_accel.accelerate(pipe, region={**REGION, "selector": "mask", "mask": mask})
    chosen = []

    def look(pipe: Any, step: int, time: Any, kwargs: dict) -> dict:
        if handle._sampler._index is not None:
            chosen.append(handle._sampler.chosen()[0].tolist())
        return kwargs

    sample(pipe, callback_on_step_end=look)
    assert len(chosen) == 3 and all(set(mask.flatten().nonzero()[:, 0].tolist()) <= set(step) for step in chosen)
    with pytest.raises(UsageError, match=r"has shape \(2, 4, 6\), and this run has \(2, 4, 4\) tokens"):
        sample(pipe, width=64)


def test_compiled_blocks_give_the_same():
    """Blocks meet two shapes, all tokens and a part; what changes from step to step is no part of their graph."""
    eager, compiled = make(), make()
    torch._dynamo.reset()
    compiled.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for pipe in (eager, compiled):
        dit_accel.accelerate(pipe, region=REGION)
    assert torch.equal(sample(compiled), sample(eager))


def test_a_branch_that_was_away_computes_every_token(rig):
    """What is kept of it is older than the choice of tokens knows; a step later it is as any other."""
    mine = rig(steps=8)
    handle = mine.accelerate()
    x, whole = mine.x, {"cond": [], "uncond": []}
    for step in range(7):
        for branch in ("cond",) if step in (2, 3) else ("cond", "uncond"):
            before = handle.report().regions.get("72 of 72 tokens", 0)
            out = mine.forward(x, 900.0 - 100 * step, branch)
            whole[branch].append(handle.report().regions.get("72 of 72 tokens", 0) > before)
        x = torch.cat([mine.step(out, x), x[:, 16:]], 1)
    assert whole == {"cond": [True] + [False] * 6, "uncond": [True, False, True, False, False]}
    assert handle.report().whole_reasons["the branch was away for a step"] == 1


def test_tokens_count_as_left_out_where_one_branch_left_them_out(rig):
    """Whatever another one computed: guidance mixes both."""
    mine = rig(steps=8)
    handle = mine.accelerate()
    sampler, x = handle._sampler, mine.x
    for step in range(4):
        active = mine.active(handle) if step else None
        for branch in ("cond", "uncond") if step in (2, 3) else ("cond",):  # at step 2 uncond comes late, and whole
            out = mine.forward(x, 900.0 - 100 * step, branch)
        before = sampler._left_out
        x = torch.cat([mine.step(out, x), x[:, 16:]], 1)
        if step:
            assert torch.equal(sampler._left_out, torch.where(active, 0, before + 1))
    assert handle.report().whole_reasons["nothing is kept of this branch yet"] == 1
