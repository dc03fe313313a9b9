"""Standing in one scheduler's `step`, and mending its history.

A scheduler that looks back (UniPC, DPM++ 2M) takes differences of what it kept from earlier steps. A token that comes
back after k steps would have the change of all of them taken for the change of one, and be carried too far by about
that factor. So what is kept of it is replaced by what it gives now: its differences vanish, and the order of the step
falls to first for this token alone. For a token that is left out they nearly vanish by themselves, since its velocity
is the same as before. The kept velocity is given as such: each step converts it with the sample of the moment.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from dit_accel.region.sampler import Sampler

# class -> whether it keeps converted outputs of earlier steps in `model_outputs`
SCHEDULERS = {
    "DPMSolverMultistepScheduler": True,
    "FlowMatchEulerDiscreteScheduler": False,
    "UniPCMultistepScheduler": True,
}


def check_scheduler(scheduler: Any) -> None:
    """Raises UsageError for one whose steps region sampling does not know, or that draws noise at each."""
    name = type(scheduler).__name__
    if name not in SCHEDULERS:
        raise UsageError(
            f"Region sampling does not know what a {name} keeps between steps. Use one of {', '.join(SCHEDULERS)}, or "
            "region=False."
        )
    config = scheduler.config
    sde = str(getattr(config, "algorithm_type", None) or "").startswith("sde")
    if sde or getattr(config, "stochastic_sampling", False):
        raise UsageError(
            f"This {name} adds noise to every token at each step, after which a velocity kept from an earlier one says "
            "nothing. Set algorithm_type='dpmsolver++' or stochastic_sampling=False, or use region=False."
        )


def mend_history(scheduler: Any, back: Tensor, velocity: Tensor, sample: Tensor) -> None:
    """Let kept outputs say, for tokens that came back, what the new velocity says.

    Args:
        back: bool, broadcastable to `velocity`: what was left out at the step before and is computed at this one.
    """
    if not SCHEDULERS[type(scheduler).__name__] or all(kept is None for kept in scheduler.model_outputs):
        return
    now = scheduler.convert_model_output(velocity, sample=sample)
    scheduler.model_outputs = [
        kept if kept is None else torch.where(back, now.to(kept.dtype), kept) for kept in scheduler.model_outputs
    ]


class Step:
    """Stands on a scheduler as its own `step`, in front of its class's. `remove` takes it away again."""

    def __init__(self, scheduler: Any, sampler: Sampler) -> None:
        self.scheduler = scheduler
        self.sampler: Sampler | None = sampler
        self._own = scheduler.__dict__.get("step")
        self._original = scheduler.step
        functools.update_wrapper(self, self._original)  # pipelines look at the signature
        scheduler.step = self

    def __call__(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.sampler is None:
            return self._original(model_output, timestep, sample, *args, **kwargs)
        self.sampler.before_step(model_output, sample)
        output = self._original(model_output, timestep, sample, *args, **kwargs)
        self.sampler.after_step(model_output)
        return output

    def remove(self) -> None:
        """Give the scheduler back the `step` it had. Nothing the second time."""
        self.sampler = None  # where another stands before us by now, this one only passes on
        if self.scheduler.__dict__.get("step") is not self:
            return
        if self._own is None:
            del self.scheduler.step
        else:
            self.scheduler.step = self._own

    def __deepcopy__(self, memo: dict) -> Any:
        """A copied scheduler has its class's `step`: nothing of ours knows it."""
        copied = memo.get(id(self.scheduler))
        return self if copied is None else types.MethodType(type(self.scheduler).step, copied)


def remove_step(scheduler: Any) -> None:
    """Remove region sampling's `step` from a scheduler, if one stands there."""
    step = getattr(scheduler, "__dict__", {}).get("step")
    if isinstance(step, Step):
        step.remove()
