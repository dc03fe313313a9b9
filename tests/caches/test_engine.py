"""What the engine decides, keeps and makes up, forward by forward, on a small Wan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import dit_accel
from dit_accel.errors import FallbackError, UsageError
from dit_accel.testing import (
    peak_bytes,
    tiny_flux2_transformer,
    tiny_qwen_image_inputs,
    tiny_qwen_image_transformer,
    tiny_sd3_inputs,
    tiny_sd3_transformer,
    tiny_wan_inputs,
    tiny_wan_pipeline,
    tiny_wan_transformer,
)

GRID = (2, 4, 5)
ALWAYS = {"name": "easy", "threshold": 1e9, "min_steps": 0}


class Model:
    """A transformer that is called step by step, with branches by name."""

    def __init__(self, batch: int = 1, grid: tuple[int, int, int] = GRID) -> None:
        self.transformer = tiny_wan_transformer()
        self.resize(batch, grid)

    def resize(self, batch: int, grid: tuple[int, int, int]) -> None:
        self.inputs = tiny_wan_inputs(self.transformer, grid, batch=batch)
        text = self.inputs["encoder_hidden_states"]
        self.text = {"cond": text, "uncond": -text}

    def __call__(self, branch: str, time: float) -> torch.Tensor:
        """One forward; latents move a little from step to step, as in sampling."""
        given = dict(self.inputs)
        x = given["hidden_states"]
        given["hidden_states"] = self.x(time)
        given["encoder_hidden_states"] = self.text[branch]
        given["timestep"] = torch.full((len(x),), float(time))
        with torch.no_grad(), self.transformer.cache_context(branch):
            return self.transformer(**given, return_dict=False)[0]

    def x(self, time: float) -> torch.Tensor:
        return self.inputs["hidden_states"] * (0.5 + time / 2000)


def accelerate(model: Model, cache: Any, **more: Any) -> dit_accel.Handle:
    return dit_accel.accelerate(model.transformer, cache=cache, **more)


def test_a_reused_step_is_what_it_says_by_hand():
    model = Model()
    first, second = model("cond", 900), model("cond", 800)
    accelerate(model, {**ALWAYS, "schedule": "110"})
    assert torch.equal(model("cond", 900), first) and torch.equal(model("cond", 800), second)
    torch.testing.assert_close(model("cond", 700), model.x(700) + (second - model.x(800)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("over", "factor"), [("noise", 3), ("step", 1)])
def test_a_continued_step_is_on_a_line(over, factor):
    """From a noise level of .9 over .85 to .7, and by as many steps."""
    model = Model()
    first, second = model("cond", 900), model("cond", 850)
    accelerate(model, {"name": "latent", "order": 1, "over": over, "schedule": "110", "min_steps": 0})
    model("cond", 900), model("cond", 850)
    torch.testing.assert_close(model("cond", 700), second + (second - first) * factor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("order", "over", "factor"), [(0, "noise", 0), (1, "noise", 3), (1, "step", 1)])
@pytest.mark.parametrize("name", ["first_block", "taylor"])
def test_blocks_left_out_add_what_they_added(name, order, over, factor):
    """Of `first_block` all but the first, which runs: `gate` stands behind it."""
    model = Model()
    tokens: list[torch.Tensor] = []
    blocks = model.transformer.blocks
    seen = blocks[-1].register_forward_hook(lambda module, args, output: tokens.append(output))
    begin = blocks[1 if name == "first_block" else 0]
    before = begin.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    model("cond", 900), model("cond", 850)
    first, second = tokens[1] - tokens[0], tokens[3] - tokens[2]
    accelerate(model, {"name": name, "order": order, "over": over, "schedule": "110", "min_steps": 0})
    tokens.clear()
    for time in (900, 850, 700):
        model("cond", time)
    seen.remove(), before.remove()
    torch.testing.assert_close(tokens[5], tokens[4] + second + (second - first) * factor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["ABAB", "ABBA", "A then AB"])
@pytest.mark.parametrize("name", ["easy", "first_block", "tokens"])
def test_branches_never_mix_whatever_their_order(order, name):
    """Each branch alone gives what it gives among the others. (Here none decides for the other.)"""
    times = [900, 800, 700, 600, 500, 400]
    cache = {"name": name, "min_steps": 0, "schedule": "110101"}

    def alone(branch: str, some: list[int]) -> dict[int, torch.Tensor]:
        model = Model()
        handle = accelerate(model, cache if some == times else {**cache, "schedule": "1101"})
        out = {time: model(branch, time) for time in some}
        handle.remove()
        return out

    late = times[2:] if order == "A then AB" else times
    expected = {"cond": alone("cond", times)}
    expected["uncond"] = alone("uncond", late) if late == times else {}
    model = Model()
    accelerate(model, cache)
    for step, time in enumerate(times):
        branches = ["cond", "uncond"] if time in late else ["cond"]
        if order == "ABBA" and step % 2:
            branches.reverse()
        for branch in branches:
            out = model(branch, time)
            if time in expected[branch]:
                torch.testing.assert_close(out, expected[branch][time], rtol=0, atol=1e-6)


def test_a_branch_that_was_away_computes():
    model = Model()
    handle = accelerate(model, {"name": "first_block", "threshold": 1e9, "min_steps": 0})
    times = [900, 800, 700, 600, 500]
    fresh = Model()("uncond", 500)
    for time in times:
        model("cond", time)
        if time in (900, 500):
            out = model("uncond", time)
    assert torch.equal(out, fresh)
    assert handle.report().computed_reasons["the branch was away"] == 1


def test_one_branch_decides_for_all():
    """cond may reuse by its own rule and does; uncond's own rule would compute."""
    model = Model()
    handle = accelerate(model, {**ALWAYS, "warmup": 2})
    for time in (900, 800, 700):
        for branch in ("cond", "uncond"):
            model(branch, time)
    assert handle.decisions() == {"transformer": "110"}
    assert handle.report().forwards == {"computed": 4, "reused": 2}


def test_other_shapes_are_strangers():
    """Batch 1, 2, 1 and another grid, each equal to a fresh model's."""
    model = Model()
    accelerate(model, ALWAYS)
    for batch, grid in ((1, GRID), (2, GRID), (1, GRID), (1, (3, 4, 5)), (1, GRID)):
        model.resize(batch, grid)
        plain = Model(batch, grid)
        for time in (900, 800):
            assert torch.equal(model("cond", time), plain("cond", time))
        model("cond", 700)


@pytest.mark.parametrize(
    ("limits", "schedule"),
    [
        ({}, "1100000"),
        ({"warmup": 4}, "1111000"),
        ({"max_consecutive": 2}, "1100100"),
        ({"max_reused": 3}, "1100011"),
        ({"compute_above": 0.65}, "1110000"),
        ({"compute_below": 0.45}, "1100011"),
        ({"threshold": 0}, "1111111"),
    ],
)
def test_limits(limits, schedule):
    model = Model()
    handle = accelerate(model, {**ALWAYS, **limits})
    for time in (900, 800, 700, 600, 500, 400, 300):
        model("cond", time)
    assert handle.decisions()["transformer"] == schedule


def test_branches_that_decide_differently_are_replayed():
    """By its own rule each: uncond's prompt drowns what changes from step to step."""
    times = [900, 700, 650, 600, 400, 390, 380, 100]

    def run(**options: Any) -> tuple[list[torch.Tensor], str]:
        model = Model()
        model.text["uncond"] = model.text["cond"] * 20
        handle = accelerate(model, {"name": "first_block", "min_steps": 0, **options})
        outs = [model(branch, time) for time in times for branch in ("cond", "uncond")]
        return outs, handle.decisions()["transformer"]

    recorded, decided = run(threshold=0.03)
    plans = dict(part.split("=") for part in decided.split("; "))
    assert plans.keys() == {"cond", "uncond"} and all("0" in plan for plan in plans.values())
    replayed, again = run(schedule=decided)
    assert again == decided
    assert all(torch.equal(x, y) for x, y in zip(recorded, replayed, strict=True))


def test_a_branch_that_a_schedule_does_not_name_is_computed():
    model = Model()
    handle = accelerate(model, {**ALWAYS, "schedule": "cond=1000"})
    for time in (900, 800, 700, 600):
        model("cond", time), model("uncond", time)
    report = handle.report()
    assert report.forwards == {"computed": 5, "reused": 3}
    assert report.computed_reasons["a branch that the schedule does not name"] == 3
    assert handle.decisions()["transformer"] == "cond=1000; uncond=1111"


def test_beyond_a_schedule_everything_is_computed():
    model = Model()
    handle = accelerate(model, {**ALWAYS, "schedule": "10"})
    for time in (900, 800, 700):
        model("cond", time)
    assert handle.decisions()["transformer"] == "101"
    assert "beyond the schedule's end" in handle.report().computed_reasons


FULL_MEMORIES = [
    {**ALWAYS, "max_consecutive": 1},
    {"name": "latent", "min_steps": 0, "threshold": 1e9, "order": 2, "warmup": 3},
    {"name": "first_block", "threshold": 1e9, "min_steps": 0},
    {"name": "first_block", "threshold": 1e9, "min_steps": 0, "order": 2, "warmup": 3},
    {"name": "tea", "threshold": 0.0, "min_steps": 0, "model": "wan21-14b"},
    {"name": "taylor", "min_steps": 0, "order": 2, "warmup": 9},
    {"name": "tokens", "min_steps": 0, "interval": 2, "selector": "staleness"},
]


def test_memory_is_what_was_declared():
    for cache in FULL_MEMORIES:
        model = Model(batch=2)
        handle = accelerate(model, cache)
        most = 0
        for time in (900, 800, 700, 600, 500):
            for branch in ("cond", "uncond"):
                out = model(branch, time)
            most = max(most, handle.report().bytes_held)
        engine = handle._caches[0]
        assert most == 2 * engine.declare(tuple(out.shape), 2 * 40, 0, 4), cache
        handle.remove()
        assert engine.bytes_held() == 0


@pytest.mark.parametrize("name", ["easy", "first_block", "tokens"])
def test_peak_memory_is_denses_and_what_is_declared(name):
    model = Model()
    model.transformer = tiny_wan_transformer(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024)
    model.resize(1, (5, 12, 12))
    times = (900, 800, 700)

    def run() -> None:
        for time in times:
            model("cond", time)

    run()
    dense, _ = peak_bytes(run)
    more = {"schedule": "101", "mlp_ratio": 0.3} if name == "tokens" else {"threshold": 0}
    handle = accelerate(model, {"name": name, "min_steps": 0, **more})
    run()
    cached, _ = peak_bytes(run)
    declared = handle._caches[0].declare(tuple(model("cond", 100).shape), 720, 0, 4)
    hidden = 720 * 256 * 4
    # tokens at the gate stay while the blocks behind it run, and new memory stands beside the old until it is put
    # (but for "tokens", which has one layer's at a time beside it)
    working = {"easy": declared, "first_block": declared + hidden, "tokens": 2 * hidden}[name]
    assert cached <= (dense + declared + working) * 1.02


@pytest.mark.parametrize("given", [ALWAYS, {"name": "tokens", "schedule": "110", "max_stale": 2, "min_steps": 0}])
def test_memory_may_be_kept_on_the_cpu(given):
    model = Model()
    handle = accelerate(model, {**given, "store_device": "cpu"})
    outs = [model("cond", time) for time in (900, 800, 700)]
    handle.remove()
    accelerate(model, given)
    for out, time in zip(outs, (900, 800, 700), strict=True):
        assert torch.equal(out, model("cond", time))


def test_gradients_are_computed_and_nothing_is_kept():
    model = Model()
    handle = accelerate(model, ALWAYS)
    model.transformer.requires_grad_(True)
    for time in (900, 800, 700):
        given = {**model.inputs, "timestep": torch.tensor([float(time)])}
        model.transformer(**given, return_dict=False)[0].sum().backward()
    report = handle.report()
    assert report.computed_reasons == {"gradients are needed": 3} and report.bytes_held == 0


def test_what_is_added_between_blocks_is_not_added_twice():
    transformer = tiny_sd3_transformer()
    inputs = tiny_sd3_inputs(transformer, (6, 7))
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    control = [torch.randn(1, 42, width) for _ in range(len(transformer.transformer_blocks))]
    handle = dit_accel.accelerate(transformer, cache={"name": "first_block", "threshold": 1e9, "min_steps": 0})
    with torch.no_grad():
        for time in (900.0, 800.0):
            given = {**inputs, "timestep": torch.tensor([time]), "block_controlnet_hidden_states": control}
            transformer(**given)
    assert handle.report().computed_reasons == {"block_controlnet_hidden_states: it is added between the blocks": 2}


def test_the_output_is_as_asked_for():
    model = Model()
    accelerate(model, ALWAYS)
    outputs = []
    for time in (900, 800, 700):
        given = {**model.inputs, "timestep": torch.tensor([float(time)])}
        with torch.no_grad():
            outputs.append(model.transformer(**given))
    assert len({type(output) for output in outputs}) == 1 and len({output.sample.shape for output in outputs}) == 1


def test_a_few_steps_leave_it_off():
    pipe = tiny_wan_pipeline()
    handle = dit_accel.accelerate(pipe, cache={"name": "easy", "threshold": 1e9})
    sample(pipe, steps=4)
    assert handle.report().forwards == {"computed": 8}
    assert list(handle.report().computed_reasons) == ["fewer than 10 steps: too far apart to stand for one another"]


def sample(pipe: Any, *, steps: int = 12, seed: int = 0, **call: Any) -> torch.Tensor:
    return pipe(
        "a red star", "blurry", 96, 112, num_frames=9, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(seed), **call,
    ).frames  # fmt: skip


@pytest.mark.parametrize("scheduler", ["euler", "unipc", "dpm++ 2m"])
def test_schedulers(scheduler):
    pipe = tiny_wan_pipeline()
    config = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    pipe.scheduler = {
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "unipc": lambda: UniPCMultistepScheduler(**config),
        "dpm++ 2m": lambda: DPMSolverMultistepScheduler(**config),
    }[scheduler]()
    stock = sample(pipe)
    with dit_accel.accelerate(pipe, cache={"name": "easy", "threshold": 0}):
        assert torch.equal(sample(pipe), stock)
    handle = dit_accel.accelerate(pipe, cache={"name": "latent", "threshold": 1e9, "max_consecutive": 1})
    alone = sample(pipe)
    assert handle.decisions() == {"transformer": "110101010101"}
    for steps in (20, 10, 20):
        sample(pipe, steps=steps, seed=1)
        assert torch.equal(sample(pipe), alone)


def test_two_pipelines_share_a_transformer():
    pipe = tiny_wan_pipeline()
    other = tiny_wan_pipeline()
    other.transformer = pipe.transformer
    dit_accel.accelerate(pipe, cache={"name": "easy", "threshold": 1e9, "max_consecutive": 1})
    alone = sample(pipe)
    first = sample(other, seed=3)
    assert torch.equal(sample(pipe), alone)
    assert torch.equal(sample(other, seed=3), first)
    assert torch.equal(sample(pipe), alone)


def test_guidance_for_some_steps_only():
    """A pipeline that drops the uncond branch and takes it up again never reuses what is old."""
    model = Model()
    handle = accelerate(model, {"name": "first_block", "threshold": 1e9, "min_steps": 0})
    for step, time in enumerate((900, 800, 700, 600, 500, 400)):
        model("cond", time)
        if step in (0, 1, 4, 5):
            model("uncond", time)
    assert handle.report().computed_reasons == {"the branch's first step": 2, "the branch was away": 1}


def test_compiled_blocks_run_in_one_graph_each(fresh_dynamo):
    pipe = tiny_wan_pipeline()
    cache = {"name": "easy", "threshold": 0, "schedule": "110100101001"}
    handle = dit_accel.accelerate(pipe, cache=cache)
    eager = sample(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(sample(pipe), eager)
    assert handle.decisions() == {"transformer": cache["schedule"]}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "ordered"), [("easy", 14), ("tokens", 24)])
def test_sparse_attention_beside_a_cache_does_not_advance_on_skipped_steps(name, ordered):
    """A forward of which some rows are computed still brings its tokens into the order of those that are kept."""
    pipe = tiny_wan_pipeline()
    sparse = {"method": "svg2", "keep": 0.4, "min_tokens": 0, "block": 16}
    handle = dit_accel.accelerate(pipe, cache={"name": name, "schedule": "110101010101"}, **sparse)
    sample(pipe)
    report = handle.report()
    layers = len(pipe.transformer.blocks)
    assert report.forwards == {"computed": 14, "reused": 10}
    assert report.sparse_calls == 14 * layers and report.plans == {"predicted": 14 * layers}
    assert sum(report.token_orders.values()) == ordered


def test_dense_calls_of_a_forward_that_is_made_up_are_not_counted():
    """Calls that never reach sparse attention are counted as the forward begins: only if it is then computed."""
    model = Model()
    stock = model.transformer.blocks[0].attn1.processor
    cache = {"name": "easy", "schedule": "11010", "min_steps": 0}
    handle = accelerate(model, cache, method="pooled", keep=0.5, min_tokens=0, block=16)
    model.transformer.blocks[0].attn1.set_processor(stock)
    for time in (900, 800, 700, 600, 500):
        model("cond", time)
    report = handle.report()
    assert report.forwards == {"computed": 3, "reused": 2}
    assert report.fallbacks == {"its processor was replaced after installation": 3} and report.dense_calls == 3
    assert report.sparse_calls == 3 * (len(model.transformer.blocks) - 1)


def test_a_reason_of_the_model_is_counted_only_for_what_is_computed():
    transformer = tiny_qwen_image_transformer()
    inputs = tiny_qwen_image_inputs(transformer, valid=(11,))
    inputs["encoder_hidden_states_mask"][0, 3] = False
    cache = {"name": "latent", "schedule": "110", "min_steps": 0}
    handle = dit_accel.accelerate(transformer, cache=cache, method="pooled", keep=0.5, min_tokens=0, block=16)
    for time in (0.9, 0.8, 0.7):
        with torch.no_grad(), transformer.cache_context("cond"):
            transformer(**{**inputs, "timestep": torch.tensor([time])})
    layers = len(transformer.transformer_blocks)
    report = handle.report()
    assert report.forwards == {"computed": 2, "reused": 1}
    assert report.fallbacks == {"a mask that keeps out text before other text": 2 * layers}
    assert report.dense_calls == 2 * layers


def test_strict_lets_a_forward_be_made_up_and_raises_before_one_is_computed():
    model = Model()
    stock = model.transformer.blocks[0].attn1.processor
    cache = {"name": "easy", "schedule": "101", "min_steps": 0}
    accelerate(model, cache, method="pooled", keep=0.5, min_tokens=0, block=16, strict=True)
    model("cond", 900)
    model.transformer.blocks[0].attn1.set_processor(stock)
    model("cond", 800)
    ran = []
    model.transformer.blocks[0].register_forward_pre_hook(lambda module, args: ran.append(module))
    with pytest.raises(FallbackError, match="processor was replaced"):
        model("cond", 700)
    assert not ran


@pytest.mark.parametrize("name", ["first_block", "tokens"])
def test_dense_steps_keep_the_order_of_sparse_ones_under_a_cache_of_tokens(name):
    """Tokens of a dense step are used in a sparse one: in another order they would be of other places."""
    pipe = tiny_wan_pipeline()
    sparse = {"method": "pooled", "keep": 1.0, "min_tokens": 0, "block": 16, "order": "tiles", "dense_above": 0.8}
    cache = {"name": name, "schedule": "101010101010"}
    if name == "tokens":
        cache["selector"] = "norm"  # chance would take other tokens in another order
    with dit_accel.accelerate(pipe, cache=cache):
        stock = sample(pipe)
    with dit_accel.accelerate(pipe, cache=cache, **sparse) as handle:
        out = sample(pipe)
    assert handle.report().forwards["reused"] == 12
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("esay", "Did you mean 'easy'"),
        ({"threshold": 0.1}, "needs its name"),
        ({"name": "easy", "treshold": 0.1}, "Did you mean 'threshold'"),
        ({"name": "easy", "threshold": -1}, "threshold=-1 is out of range"),
        ({"name": "easy", "threshold": "0.1"}, "threshold='0.1' is out of range"),
        ({"name": "easy", "schedule": "012"}, "schedule='012' is out of range"),
        ({"name": "easy", "schedule": "01"}, "the first of them 1"),
        ({"name": "easy", "schedule": "cond=11; uncond=01"}, "the first of them 1"),
        ({"name": "easy", "schedule": "11; uncond=10"}, "for each branch"),
        ({"name": "easy", "schedule": "cond=11; cond=10"}, "for each branch"),
        ({"name": "easy", "schedule": "=11"}, "for each branch"),
        ({"name": "easy", "schedule": True}, "schedule=True is out of range"),
        ({"name": "easy", "schedule": "11", "dry_run": True}, "exclude each other"),
        ({"name": "latent", "order": 3}, "order=3 is out of range"),
        ({"name": "first_block", "order": -1}, "order=-1 is out of range"),
        ({"name": "taylor", "over": "time"}, "over='time' is out of range"),
        ({"name": "dual_block", "fn": 0}, "fn=0 is out of range"),
        ({"name": "dual_block", "fn": 8}, "leave at least one"),
        ({"name": "mag"}, "needs ratios"),
        ({"name": "tea"}, "needs either model"),
        ({"name": "tea", "model": "wan"}, "Did you mean 'wan21"),
        ({"name": "tokens", "selector": "map"}, "selector='map' is out of range"),
        (3, "give a cache's name"),
    ],
)  # fmt: skip
def test_bad_options(given, message):
    model = Model()
    with pytest.raises(UsageError, match=message):
        accelerate(model, given)
    assert "_diffusers_hook" not in model.transformer.__dict__
    assert not any("_diffusers_hook" in block.__dict__ for block in model.transformer.blocks)


def test_a_second_cache_takes_over():
    model = Model()
    first = accelerate(model, {"name": "first_block", "threshold": 1e9, "min_steps": 0})
    second = accelerate(model, ALWAYS)
    for time in (900, 800, 700):
        model("cond", time)
    assert first.report().forwards == {} and second.report().forwards == {"computed": 2, "reused": 1}
    first.remove()  # does nothing any more
    model("cond", 600)
    assert second.report().forwards["reused"] == 2
    dit_accel.accelerate(model.transformer, keep=0.5, min_tokens=0)
    assert not second._caches[0].installed
    second.remove()
    assert "forward" not in model.transformer.__dict__


def test_blocks_that_are_no_one_stack():
    with pytest.raises(UsageError, match="easy or latent"):
        dit_accel.accelerate(tiny_flux2_transformer(), cache="first_block")


def test_a_cached_transformer_is_not_copied_in_silence():
    model = Model()
    handle = accelerate(model, "easy")
    with pytest.raises(UsageError, match="cannot be copied"):
        copy.deepcopy(model.transformer)
    handle.remove()
    copy.deepcopy(model.transformer)
