"""What the engine decides, keeps and makes up, forward by forward, on a small Wan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepping import ALWAYS, GRID, Model, accelerate

import dit_accel
from dit_accel.testing import (
    tiny_sd3_inputs,
    tiny_sd3_transformer,
)


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
    handle = dit_accel.accelerate(
        transformer, cache={"name": "first_block", "threshold": 1e9, "min_steps": 0}
    )
    with torch.no_grad():
        for time in (900.0, 800.0):
            given = {**inputs, "timestep": torch.tensor([time]), "block_controlnet_hidden_states": control}
            transformer(**given)
    assert handle.report().computed_reasons == {
        "block_controlnet_hidden_states: it is added between the blocks": 2
    }


def test_the_output_is_as_asked_for():
    model = Model()
    accelerate(model, ALWAYS)
    outputs = []
    for time in (900, 800, 700):
        given = {**model.inputs, "timestep": torch.tensor([float(time)])}
        with torch.no_grad():
            outputs.append(model.transformer(**given))
    assert (
        len({type(output) for output in outputs}) == 1
        and len({output.sample.shape for output in outputs}) == 1
    )
