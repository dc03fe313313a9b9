"""Run a pipeline and keep what it tells its transformer: the schedule, the conditions of each branch, the latents.

The pipeline's own code prepares everything (text, guidance, places of tokens, the shift of the schedule), so that a
student is trained on the very arguments it will meet. Nothing about a family is repeated here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.errors import UsageError
from dit_accel.training.samples import Condition, Schedule

if TYPE_CHECKING:
    from dit_accel.preset import GenerateOptions

_NOT_KEPT = ("hidden_states", "timestep", "return_dict")


@dataclass(frozen=True)
class Captured:
    """What one run of a pipeline came to."""

    latents: Tensor  # `[1, ...]` after the last step that was made
    conditions: tuple[Condition, ...]  # of the branches, in the order in which the pipeline runs them
    schedule: Schedule


class _Listener:
    """A hook that keeps the arguments of the forwards of a run's first step."""

    def __init__(self, transformer: nn.Module) -> None:
        self._signature = inspect.signature(inspect.unwrap(type(transformer).forward))
        self.timestep: float | None = None
        self.rows: int = 0
        self.conditions: list[dict[str, Any]] = []
        self.shape: tuple[int, ...] = ()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(self._signature.bind(module, *args, **kwargs).arguments)
        given.pop(next(iter(self._signature.parameters)))  # self
        timestep, latents = given["timestep"], given["hidden_states"]
        if timestep.ndim > 1:
            raise UsageError(
                f"{type(module).__name__} gets a noise level for every token here (image to video); fine-tuning is for "
                "models with one noise level a clip: use its text-to-video pipeline"
            )
        now = float(timestep.max())
        if self.timestep is None:
            self.timestep = now
        if now != self.timestep:
            return  # the second step
        self.shape = (1, *latents.shape[1:])
        kept = {name: value for name, value in given.items() if name not in _NOT_KEPT and value is not None}
        # guidance in one forward: a row for each branch
        self.conditions += [_take_row(kept, row, len(latents)) for row in range(len(latents))]


def run_captured(
    pipe: Any, options: GenerateOptions, prompt: str, *, seed: int, steps: int | None = None
) -> Captured:
    """Run a pipeline on one prompt and keep what it told its transformer.

    Args:
        pipe: dense. Of two experts the first tells the conditions, which are the second's too.
        options: size, steps, guidance and the like.
        seed: of a CPU generator, as for `generate`.
        steps: stop after so many steps of the schedule; None makes all of them, and the latents are clean.

    Raises:
        UsageError: a pipeline that gives its transformer more than latents (a picture's channels, a noise level for
            each token).
    """
    transformer = pipe.transformer
    listener = _Listener(transformer)
    latents: list[Tensor] = []

    def after_step(pipeline: Any, step: int, _: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        latents[:] = [kwargs["latents"]]
        if steps is not None and step + 1 >= steps:
            pipeline._interrupt = True  # diffusers' own way to leave out the rest
        return kwargs

    call: dict[str, Any] = {
        "prompt": prompt,
        "width": options.width,
        "height": options.height,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
    }
    takes = inspect.signature(type(pipe).__call__).parameters
    if "num_frames" in takes:
        call["num_frames"] = options.frames
    if "guidance_scale_2" in takes:
        call["guidance_scale_2"] = options.guidance_2
    if "negative_prompt" in takes:
        call["negative_prompt"] = options.negative_prompt
    hook = transformer.register_forward_pre_hook(listener, with_kwargs=True)
    try:
        with torch.no_grad():
            pipe(
                **call,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                callback_on_step_end=after_step,
                return_dict=False,
            )
    finally:
        hook.remove()
    (clean,) = latents
    if tuple(clean.shape) != listener.shape:
        raise UsageError(
            f"{type(pipe).__name__} gives its transformer {listener.shape} where its latents are {tuple(clean.shape)} "
            "(a picture's channels beside them); fine-tuning is for models that get latents alone"
        )
    assert listener.timestep is not None
    return Captured(clean.float(), tuple(listener.conditions), read_schedule(pipe.scheduler, listener.timestep))


def read_boundary(pipe: Any, schedule: Schedule) -> float | None:
    """The timestep below which a pipeline's second transformer takes over; None where there is one alone."""
    if getattr(pipe, "transformer_2", None) is None:
        return None
    return pipe.config.boundary_ratio * schedule.scale


def read_schedule(scheduler: Any, first_timestep: float) -> Schedule:
    """The schedule that a run has set.

    Args:
        first_timestep: what the transformer got at the first step, which tells whether it counts to 1 or to 1000.
    """
    count = len(scheduler.timesteps)
    sigmas = [float(sigma) for sigma in scheduler.sigmas[:count]]
    training = float(scheduler.config.num_train_timesteps)
    scale = training if abs(first_timestep - training * sigmas[0]) < abs(first_timestep - sigmas[0]) else 1.0
    factor = scale / training  # the scheduler counts to 1000 in any case
    return Schedule(tuple(sigmas), tuple(float(t) * factor for t in scheduler.timesteps), scale)


def _take_row(arguments: Mapping[str, Any], row: int, rows: int) -> dict[str, Any]:
    """The arguments of one row of a batch; what has no row for each is everybody's."""
    return {
        name: value[row : row + 1].clone() if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for name, value in arguments.items()
    }
