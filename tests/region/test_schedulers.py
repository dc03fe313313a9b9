"""Standing in a scheduler's step: what it refuses, how it leaves, and what it mends where a token comes back."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import dit_accel
from dit_accel.errors import UsageError
from dit_accel.region.schedulers import Step, mend_history
from dit_accel.testing import tiny_wan_pipeline

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
REGION = {"sample_ratio": 0.5, "bucket": 4}


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (HeunDiscreteScheduler(), "does not know what a HeunDiscreteScheduler keeps"),
        (EulerAncestralDiscreteScheduler(), "Use one of DPMSolverMultistepScheduler, FlowMatchEuler"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "adds noise to every token"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise to every token"),
    ],
)
def test_it_refuses_what_it_does_not_know(scheduler, why):
    pipe = tiny_wan_pipeline()
    own = pipe.scheduler
    pipe.scheduler = scheduler
    with pytest.raises(UsageError, match=why):
        dit_accel.accelerate(pipe, region=REGION)
    assert "step" not in vars(scheduler) and not hasattr(pipe.transformer.blocks[0].attn1, "_dit_accel")
    # nor does it come in later
    pipe.scheduler = own
    handle = dit_accel.accelerate(pipe, region=REGION)
    pipe.scheduler = scheduler
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    with pytest.raises(UsageError, match=why):
        pipe(prompt="a", **call)
    handle.remove()
    assert "step" not in vars(own)


def test_it_needs_the_whole_pipeline():
    pipe = tiny_wan_pipeline()
    with pytest.raises(UsageError, match="WanTransformer3DModel has none: give `accelerate` the whole pipeline"):
        dit_accel.accelerate(pipe.transformer, region=REGION)


def test_it_leaves_by_identity():
    pipe = tiny_wan_pipeline()
    scheduler, function = pipe.scheduler, type(pipe.scheduler).step
    hooks = len(pipe.transformer.proj_out._forward_hooks)
    handle = dit_accel.accelerate(pipe, region=REGION)
    assert isinstance(scheduler.step, Step)
    assert inspect.signature(scheduler.step) == inspect.signature(function.__get__(scheduler))
    second = dit_accel.accelerate(pipe, region=REGION)  # takes over
    assert scheduler.step.sampler is second._sampler
    handle.remove(), handle.remove()
    assert scheduler.step.sampler is second._sampler and len(pipe.transformer.proj_out._forward_hooks) > hooks
    third = dit_accel.accelerate(pipe, "tiny-wan-fast")  # without region sampling: takes over, too
    assert scheduler.step.__func__ is function
    second.remove(), third.remove(), third.remove()
    assert scheduler.step.__func__ is function and "step" not in vars(scheduler)
    assert len(pipe.transformer.proj_out._forward_hooks) == hooks


def test_what_stood_there_before_comes_back_and_what_came_after_stays():
    pipe = tiny_wan_pipeline()
    before = pipe.scheduler.step = pipe.scheduler.step
    handle = dit_accel.accelerate(pipe, region=REGION)
    handle.remove()
    assert pipe.scheduler.step is before
    handle = dit_accel.accelerate(pipe, region=REGION)
    ours = pipe.scheduler.step
    after = pipe.scheduler.step = lambda *args, **kwargs: ours(*args, **kwargs)
    handle.remove()
    assert pipe.scheduler.step is after and ours.sampler is None  # ours only passes on


def test_a_copied_scheduler_knows_nothing_of_us():
    pipe = tiny_wan_pipeline()
    dit_accel.accelerate(pipe, region=REGION)
    copied = copy.deepcopy(pipe.scheduler)
    assert copied.step.__self__ is copied and copied.step.__func__ is type(copied).step


def test_another_scheduler_is_followed_at_the_next_run():
    pipe = tiny_wan_pipeline()
    handle = dit_accel.accelerate(pipe, region={**REGION, "start": 1, "error_reset": ()})
    old, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe(prompt="a", height=32, width=48, num_frames=5, num_inference_steps=4, guidance_scale=1, output_type="latent")
    assert handle.report().regions == {"12 of 12 tokens": 2, "8 of 12 tokens": 2}
    assert isinstance(pipe.scheduler.step, Step) and "step" not in vars(old)


class Run:
    """A scheduler that is driven by given velocities; beside it, one whose history is mended from a step on."""

    def __init__(self, scheduler, steps: int = 8) -> None:
        self.scheduler = scheduler
        scheduler.set_timesteps(steps)
        self.x = torch.randn(1, 4, 2, 6, 6, generator=torch.Generator().manual_seed(1))

    def step(self, velocity: Tensor, back: Tensor | None = None) -> Tensor:
        if back is not None:
            mend_history(self.scheduler, back, velocity, self.x)
        time = self.scheduler.timesteps[self.scheduler.step_index or 0]
        self.x = self.scheduler.step(velocity, time, self.x, return_dict=False)[0]
        return self.x


def velocities(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 4, 2, 6, 6, generator=generator) for _ in range(steps)]


BACK = torch.zeros(1, 1, 2, 6, 6, dtype=torch.bool)
BACK[..., :2] = True
HISTORIES = {
    "dpm2": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm3": lambda: DPMSolverMultistepScheduler(solver_order=3, **FLOW),
    "unipc2": lambda: UniPCMultistepScheduler(**FLOW),
    "unipc3": lambda: UniPCMultistepScheduler(solver_order=3, **FLOW),
    "unipc-bh1": lambda: UniPCMultistepScheduler(solver_type="bh1", **FLOW),
    "unipc-no-corrector": lambda: UniPCMultistepScheduler(disable_corrector=list(range(8)), **FLOW),
}


@pytest.mark.parametrize("name", list(HISTORIES))
def test_a_token_that_comes_back_is_stepped_in_first_order(name):
    """By hand: x' = (s'/s) x + (a' - a s'/s) m with m = x - s v; UniPC's corrector as well, from the sample before."""
    mended, plain = Run(HISTORIES[name]()), Run(HISTORIES[name]())
    *first, last = velocities(5)
    for velocity in first:
        mended.step(velocity), plain.step(velocity)
    sigmas, index = mended.scheduler.sigmas, mended.scheduler.step_index
    x, before = mended.x, getattr(mended.scheduler, "last_sample", None)
    x0 = x - sigmas[index] * last
    out, other = mended.step(last, BACK), plain.step(last)

    def move(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return end / start * x + ((1 - end) - (1 - start) * end / start) * x0

    if name.startswith("unipc") and "no-corrector" not in name:
        x = move(before, sigmas[index - 1], sigmas[index])
    expected = move(x, sigmas[index], sigmas[index + 1])
    where = BACK.expand_as(out)
    torch.testing.assert_close(out[where], expected[where], rtol=1e-4, atol=1e-5)
    assert torch.equal(out[~where], other[~where])  # its neighbours never notice
    assert not torch.allclose(out[where], other[where], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", list(HISTORIES))
def test_the_step_behind_that_has_its_order_again(name):
    """Mending is no lasting loss: two steps on, what is kept is what an unmended run keeps."""
    mended, plain = Run(HISTORIES[name]()), Run(HISTORIES[name]())
    order = mended.scheduler.config.solver_order
    given = velocities(6)
    for number, velocity in enumerate(given):
        plain.x = mended.x.clone()  # the same samples for both, so that only histories could differ
        mended.step(velocity, BACK if number == 2 else None), plain.step(velocity)
        if number >= 2 + order:
            for one, two in zip(mended.scheduler.model_outputs, plain.scheduler.model_outputs, strict=True):
                assert torch.equal(one, two)


def test_euler_and_a_first_step_have_nothing_to_mend():
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), HISTORIES["unipc2"]()):
        run, plain = Run(scheduler), Run(copy.deepcopy(scheduler))
        velocity = velocities(1)[0]
        assert torch.equal(run.step(velocity, BACK), plain.step(velocity))
