"""Caches in whole runs of a small Wan: schedulers, guidance, a shared transformer, compiled blocks."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from stepping import Model, accelerate, sample

import dit_accel
from dit_accel.testing import (
    tiny_wan_pipeline,
)


def test_a_few_steps_leave_it_off():
    pipe = tiny_wan_pipeline()
    handle = dit_accel.accelerate(pipe, cache={"name": "easy", "threshold": 1e9})
    sample(pipe, steps=4)
    assert handle.report().forwards == {"computed": 8}
    assert list(handle.report().computed_reasons) == [
        "fewer than 10 steps: too far apart to stand for one another"
    ]


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
