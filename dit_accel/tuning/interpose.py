"""Standing between a pipeline and its scheduler, and before its transformers, for the time of one run."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import UsageError
from dit_accel.roles import ROLES

# Takes the number of the step and the velocity that the scheduler is about to be given; gives the one it is given.
OnStep = Callable[[int, Tensor], Tensor]


class Finished(Exception):
    """The last step that was wanted is done: nothing is to be decoded."""


class Walk:
    """What is noted of the scheduler while `walk` holds."""

    def __init__(self) -> None:
        self.steps = 0
        self.final: Tensor | None = None  # the sample behind the last step
        self.scheduler: Any = None  # as it was before the first step


@contextlib.contextmanager
def walk(scheduler: Any, on_step: OnStep, steps: int | None = None) -> Iterator[Walk]:
    """Be told of every step of a scheduler, of one run.

    Args:
        scheduler: whose `step` takes the model's output, a timestep and the sample, as diffusers' do.
        steps: behind so many the run is ended by `Finished`, before anything is decoded; None: it ends by itself.
    """
    noted, own, original = Walk(), scheduler.__dict__.get("step"), scheduler.step

    @functools.wraps(original)  # pipelines look at the signature
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if noted.scheduler is None:
            noted.scheduler = _copy(scheduler)
        given = on_step(noted.steps, model_output)
        result = original(given, timestep, sample, *args, **kwargs)
        noted.steps += 1
        noted.final = result[0]
        if noted.steps == steps:
            raise Finished
        return result

    scheduler.step = step
    try:
        yield noted
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


def solver_weights(scheduler: Any) -> list[float]:
    """How much the sample at the end moves with the velocity of each step, that of others held.

    The sample that a deterministic solver ends with is linear in its velocities, so that one walk over unit vectors
    tells all of it, exactly and without a model.

    Args:
        scheduler: as it stands before its first step; it is left alone.

    Raises:
        UsageError: one that draws noise at its steps.
    """
    found = _weights(_copy(scheduler))
    if found != _weights(_copy(scheduler)):
        raise UsageError(
            f"This {type(scheduler).__name__} adds noise at each step, so that runs cannot be compared. Set "
            "stochastic_sampling=False or algorithm_type='dpmsolver++'."
        )
    return found


def _weights(scheduler: Any) -> list[float]:
    n = len(scheduler.timesteps)
    sample = torch.zeros(1, 1, 1, 1, n, device=scheduler.timesteps.device)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = torch.zeros_like(sample)
        velocity[..., step] = 1
        sample = scheduler.step(velocity, timestep, sample, return_dict=False)[0]
    return sample.flatten().tolist()


def _copy(scheduler: Any) -> Any:
    """A copy whose `step` is its class's."""
    new = object.__new__(type(scheduler))
    new.__dict__ = copy.deepcopy({name: x for name, x in scheduler.__dict__.items() if name != "step"})
    return new


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's transformers, by role."""
    found = {role: getattr(pipe, role, None) for role in ROLES}
    return {role: module for role, module in found.items() if isinstance(module, nn.Module)}


@contextlib.contextmanager
def idle(pipe: Any, is_idle: Callable[[], bool], output: Tensor, tick: Callable[[], None]) -> Iterator[None]:
    """Have the transformers give `output` at once, computing nothing, while `is_idle` says so.

    Args:
        tick: called behind every forward that is computed.
    """
    modules = list(transformers_of(pipe).values())
    had = [(module, module.__dict__.get("forward"), module.forward) for module in modules]

    def stand_in(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_idle():
                return (output,)
            result = forward(*args, **kwargs)
            tick()
            return result

        return call

    for module, _, forward in had:
        module.forward = stand_in(forward)
    try:
        yield
    finally:
        for module, own, _ in had:
            if own is None:
                del module.forward
            else:
                module.forward = own
