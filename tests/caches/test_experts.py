"""Two experts of one pipeline, as Wan 2.2's: what a cache keeps never crosses the boundary, wherever it lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.testing import tiny_wan_pipeline

STEPS = 8
SPLITS = {0.9: (3, 5), 0.75: (5, 3), 0.5: (7, 1)}  # boundary: steps of the first and of the second expert


@pytest.fixture(params=SPLITS, ids=str)
def pipe(request: pytest.FixtureRequest) -> Any:
    pipe = tiny_wan_pipeline(two_experts=True)
    pipe.register_to_config(boundary_ratio=request.param)
    return pipe


def test_each_expert_begins_anew(cache, pipe, options_for, sample):
    handle = dit_accel.accelerate(pipe, cache=options_for(cache, "wan-two-experts"))
    alone = sample(pipe, steps=STEPS)
    report = handle.report(clear=True)
    assert report.computed_reasons["the branch's first step"] == 4  # two branches of two experts
    assert report.forwards["reused"] >= 2
    assert torch.equal(sample(pipe, steps=STEPS), alone)
    assert handle.report().forwards == report.forwards


def test_the_second_expert_knows_nothing_of_the_first(cache, pipe, options_for, sample):
    """Given the same latents, it gives the same beside a first expert with a cache and beside one without."""
    given: list[torch.Tensor] = []
    sample(pipe, steps=STEPS, callback_on_step_end=lambda _, __, ___, kwargs: given.append(kwargs["latents"]) or {})

    def replay() -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        hook = pipe.transformer_2.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        sample(pipe, steps=STEPS, callback_on_step_end=lambda _, step, __, ___: {"latents": given[step].clone()})
        hook.remove()
        return outputs

    handle = dit_accel.accelerate(pipe, cache=options_for(cache, "wan-two-experts"))
    both = replay()
    first, second = handle._caches
    first.remove()
    alone = replay()
    assert second.installed and len(alone) == len(both) == 2 * SPLITS[pipe.config.boundary_ratio][1]
    assert all(torch.equal(*outputs) for outputs in zip(alone, both, strict=True))


@pytest.mark.parametrize("module", ["transformer", "transformer_2"])
def test_a_run_that_broke_off_in_either_expert_leaves_nothing(cache, module, options_for, sample):
    pipe = tiny_wan_pipeline(two_experts=True)
    pipe.register_to_config(boundary_ratio=0.75)
    dit_accel.accelerate(pipe, cache=options_for(cache, "wan-two-experts"))
    fresh = sample(pipe, steps=STEPS)

    def stop(module: Any, args: tuple) -> None:
        raise KeyboardInterrupt

    hook = getattr(pipe, module).proj_out.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        sample(pipe, steps=STEPS, seed=1)
    hook.remove()
    assert torch.equal(sample(pipe, steps=STEPS), fresh)
