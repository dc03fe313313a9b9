"""Sampler: the choice of tokens in a pipeline of diffusers. It stands in the scheduler's `step`."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.region.chooser import Chooser
from dit_accel.region.options import Region
from dit_accel.region.schedulers import Step, check_scheduler, mend_history, remove_step
from dit_accel.trajectory import Call, Trajectory


class Sampler(Chooser):
    """A `Chooser` that follows a pipeline's scheduler.

    Args:
        region: what was asked for.
        pipe: whose scheduler it stands in, from the beginning of each run if that is replaced.
        trajectory: whose runs bound its memory.

    Raises:
        UsageError: no scheduler, or one that region sampling does not know.
    """

    def __init__(self, region: Region, pipe: Any, trajectory: Trajectory) -> None:
        if not hasattr(pipe, "scheduler"):
            raise UsageError(
                f"Region sampling chooses tokens where a scheduler steps, and {type(pipe).__name__} has none: give "
                "`accelerate` the whole pipeline."
            )
        check_scheduler(pipe.scheduler)
        self._pipe = weakref.ref(pipe)
        super().__init__(region, trajectory)
        remove_step(pipe.scheduler)
        self._stand: Step | None = Step(pipe.scheduler, self)

    def remove(self) -> None:
        """Give the scheduler its own `step` back, and forget everything."""
        if self._stand is not None:
            self._stand.remove()
        self._stand = None
        self._begin()

    @property
    def installed(self) -> bool:
        return self._stand is not None

    def follow_scheduler(self) -> None:
        """Stand in the pipeline's scheduler, if another took the place of the one before.

        Raises:
            UsageError: one that region sampling does not know.
        """
        scheduler = getattr(self._pipe(), "scheduler", None)
        if self._stand is None or scheduler is None or scheduler is self._stand.scheduler:
            return
        check_scheduler(scheduler)
        self._stand.remove()
        remove_step(scheduler)
        self._stand = Step(scheduler, self)
        self._begin()

    def after_step(self, velocity: Tensor) -> None:
        """Choose the tokens of the next step."""
        call = self._now
        # image to image begins within the schedule, and not all pipelines say so before
        if self._first is None and call is not None and self._left_out is not None:
            self._first, self._plans = self._stand.scheduler.step_index - 1 - call.step, {}
        super().after_step(velocity)

    def _begin(self) -> None:
        super()._begin()
        self._first: int | None = None  # the scheduler's number for the run's first step

    def _steps(self) -> int:
        scheduler = self._stand.scheduler
        first = self._first if self._first is not None else (getattr(scheduler, "begin_index", None) or 0)
        return len(scheduler.timesteps) - first

    def _mend(self, back: Tensor, velocity: Tensor, sample: Tensor) -> None:
        mend_history(self._stand.scheduler, back, velocity, sample)

    def _why_planned(self, call: Call, step: int) -> str | None:
        return "region sampling was removed" if self._stand is None else super()._why_planned(call, step)
