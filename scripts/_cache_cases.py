"""Cases in which what a step cache remembers is of another run, branch, size or pipeline than the one at hand.

Each case gives how far a run is from the same run of a fresh pipeline with the same cache: the largest absolute
difference, 0 where nothing leaked. What is compared is latents, but for guidance: there it is what the transformer
gives for the prompt, which must not depend on whether forwards for the negative prompt come in between. Both runs of
that case are given the same latents at each step, so that nothing but the cache can tell them apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from _cache_rivals import Rival, Setting
from torch import Tensor, nn

BROKEN_AT = 4  # the step after which a run is broken off, or another one begins
GUIDED = (range(0, 5), range(7, 1000))  # steps with guidance where it is an interval


class Stop(Exception):
    """Ends a run, as an error or Ctrl-C would."""


@dataclass
class Bench:
    """Pipelines with one rival on each, and calls of them."""

    make: Callable[[], Any]  # a stock pipeline with a transformer and a scheduler of its own
    rival: Rival
    setting: Setting
    call: dict[str, Any]  # arguments all runs have in common, `height` and `width` among them
    prompts: tuple[str, ...]  # two of them
    guidance: float
    known: dict[str, Tensor] = field(default_factory=dict)  # results of fresh pipelines, by call
    ran: float = 1.0  # share of forwards that ran in the latest of them

    def fresh(self, branches: int = 2) -> contextlib.AbstractContextManager[Any]:
        setting = Setting(self.setting.steps, self.setting.ratios, branches)
        return self.rival.on(self.make(), setting)

    def run(self, pipe: Any, *, seed: int = 0, batch: int = 1, wider: bool = False, **more: Any) -> Tensor:
        """Latents of one run."""
        call = {**self.call, "guidance_scale": self.guidance, **more}
        if wider:
            call["width"] = call["width"] + 32
        if "negative_prompt" in call:
            call["negative_prompt"] = [call["negative_prompt"]] * batch
        prompts = [self.prompts[(seed + i) % len(self.prompts)] for i in range(batch)]
        noise = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
        return pipe(
            prompt=prompts, generator=noise, output_type="latent", num_inference_steps=self.setting.steps, **call
        ).frames

    def alone(self, **call: Any) -> Tensor:
        """What a fresh pipeline gives; run once for all cases."""
        key = repr(sorted(call.items()))
        if key not in self.known:
            with self.fresh() as pipe:
                calls = [0]
                pipe.transformer.blocks[-1].ffn.net[-1].register_forward_hook(
                    lambda *_: calls.__setitem__(0, calls[0] + 1)
                )
                self.known[key] = self.run(pipe, **call)
                self.ran = calls[0] / (2 * self.setting.steps)
        return self.known[key]


def after_a_stop(bench: Bench, stop: Callable[[Bench, Any], None], **call: Any) -> float:
    alone = bench.alone(**call)
    with bench.fresh() as pipe:
        stop(bench, pipe)
        return apart(bench.run(pipe, **call), alone)


def stop_after_a_step(bench: Bench, pipe: Any) -> None:
    def stop(_: Any, step: int, __: Any, kwargs: dict) -> dict:
        if step == BROKEN_AT:
            raise Stop
        return kwargs

    with contextlib.suppress(Stop):
        bench.run(pipe, seed=1, callback_on_step_end=stop)


def stop_within(bench: Bench, pipe: Any) -> None:
    """In the last block of the second forward of the second step, or of the fourth one that comes so far."""
    calls = [0]

    def stop(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise Stop

    hook = pipe.transformer.blocks[-1].ffn.net[-1].register_forward_pre_hook(stop)
    with contextlib.suppress(Stop):
        bench.run(pipe, seed=1)
    hook.remove()


def stop_between_branches(bench: Bench, pipe: Any) -> None:
    calls = [0]

    def stop(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 2 * BROKEN_AT:
            raise Stop

    hook = pipe.transformer.register_forward_pre_hook(stop)
    with contextlib.suppress(Stop):
        bench.run(pipe, seed=1)
    hook.remove()


def between(bench: Bench, **other: Any) -> float:
    """The same run twice, another one in between."""
    alone = bench.alone()
    with bench.fresh() as pipe:
        bench.run(pipe)
        bench.run(pipe, seed=1, **other)
        return apart(bench.run(pipe), alone)


def shared_transformer(bench: Bench) -> float:
    """Two pipelines take turns on one transformer."""
    alone = bench.alone()
    with bench.fresh() as pipe:
        other = type(pipe)(**{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)})
        other.set_progress_bar_config(disable=True)
        bench.run(pipe)
        bench.run(other, seed=1)
        return apart(bench.run(pipe), alone)


def two_instances(bench: Bench) -> float:
    """Two pipelines with nothing but their class in common; one runs between two steps of the other."""
    with bench.fresh() as first, bench.fresh() as second:

        def run_other(_: Any, step: int, __: Any, kwargs: dict) -> dict:
            if step == BROKEN_AT:
                bench.run(second, seed=1)
            return kwargs

        mixed = bench.run(first, callback_on_step_end=run_other)
    return apart(mixed, bench.alone())


def guidance_interval(bench: Bench) -> float:
    """Guidance is off for some steps in mid-run: forwards for the prompt alone."""
    seen: list[Tensor] = []

    def guide(pipe: Any, step: int) -> None:
        pipe._guidance_scale = bench.guidance if any(step + 1 in steps for steps in GUIDED) else 1.0

    def record(pipe: Any, step: int, _: Any, kwargs: dict) -> dict:
        seen.append(kwargs["latents"].clone())
        guide(pipe, step)
        return {}

    bench.run(bench.make(), callback_on_step_end=record)
    with bench.fresh() as pipe:
        mixed = _prompted(bench, pipe, seen, bench.guidance, guide)
    with bench.fresh(branches=1) as pipe:
        alone = _prompted(bench, pipe, seen, 1.0, lambda pipe, step: None)
    return max(map(apart, mixed, alone))


def _prompted(
    bench: Bench, pipe: Any, latents: list[Tensor], guidance: float, guide: Callable[[Any, int], None]
) -> list[Tensor]:
    """What the transformer gives for the prompt at each step, of a run that is given its latents."""

    def replay(pipe: Any, step: int, _: Any, __: dict) -> dict:
        guide(pipe, step)
        return {"latents": latents[step].clone()}

    outputs: list[Tensor] = []
    prompted: list[bool] = []

    def name(_: nn.Module, args: tuple, kwargs: dict) -> None:
        text = kwargs["encoder_hidden_states"]
        names.setdefault(text.data_ptr(), len(names))
        prompted.append(names[text.data_ptr()] == 0)  # the prompt comes first

    def keep(_: nn.Module, __: tuple, output: Any) -> None:
        if prompted[-1]:
            outputs.append(output[0].clone())

    names: dict[int, int] = {}
    with _hooks(pipe.transformer, name, keep):
        bench.run(pipe, guidance_scale=guidance, callback_on_step_end=replay)
    assert len(outputs) == len(latents)
    return outputs


@contextlib.contextmanager
def _hooks(module: nn.Module, before: Callable, behind: Callable) -> Iterator[None]:
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(behind)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def apart(some: Tensor, other: Tensor) -> float:
    return float((some.double() - other.double()).abs().max())


CASES: dict[str, Callable[[Bench], float]] = {
    "guidance for some steps only": guidance_interval,
    "another instance runs between two steps": two_instances,
    "two pipelines, one transformer": shared_transformer,
    "broken off after a step": lambda bench: after_a_stop(bench, stop_after_a_step),
    "broken off within a forward": lambda bench: after_a_stop(bench, stop_within),
    "broken off between two branches": lambda bench: after_a_stop(bench, stop_between_branches),
    "broken off, then two prompts": lambda bench: after_a_stop(bench, stop_after_a_step, batch=2),
    "broken off, then another size": lambda bench: after_a_stop(bench, stop_after_a_step, wider=True),
    "one prompt, two, one": lambda bench: between(bench, batch=2),
    "another size in between": lambda bench: between(bench, wider=True),
}
