"""A run may break off anywhere: the next one is as fresh. Every place is tried, at every forward of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel.testing import tiny_wan_pipeline

STEPS = 5
FORWARDS = 2 * STEPS  # cond, then uncond of each step: the second is inside step 0, too
# where in a forward: in front of this module. Within a step made up whole none of them runs; where blocks are left out,
# all but those of the last block do; under `tokens`, those for some rows, too.
PLACES: dict[str, Callable[[Any], nn.Module]] = {
    "before it": lambda pipe: pipe.transformer,  # which is behind the one before it, too
    "at its begin": lambda pipe: pipe.transformer.patch_embedding,
    "in the last block": lambda pipe: pipe.transformer.blocks[-1].attn2,
    "behind the blocks": lambda pipe: pipe.transformer.proj_out,
}
WHOLE = ("easy", "latent")  # what leaves out whole forwards


class Stop(BaseException):
    """As Ctrl-C, no `Exception`."""


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_broke_off_leaves_nothing(cache, place, options_for, sample):
    pipe = tiny_wan_pipeline()
    handle = dit_accel.accelerate(pipe, cache=options_for(cache, "wan-t2v"))
    fresh = sample(pipe, steps=STEPS)
    forwards = handle.report(clear=True).forwards
    assert forwards["reused"] >= 2 and sum(forwards.values()) == FORWARDS
    everywhere = place == "before it" or (cache not in WHOLE and place != "in the last block") or cache == "tokens"
    times = FORWARDS if everywhere else forwards["computed"]
    for time in range(1, times + 1):
        with stop_at(pipe, place, time) as stopped:
            sample(pipe, steps=STEPS, seed=1)
        assert stopped, f"no forward number {time} comes there"
        assert torch.equal(sample(pipe, steps=STEPS), fresh), f"forward {time}"
    with stop_at(pipe, place, times + 1) as stopped:
        sample(pipe, steps=STEPS)
    assert not stopped  # so that every one was tried


def test_a_run_that_broke_off_between_two_steps_leaves_nothing(cache, options_for, sample):
    pipe = tiny_wan_pipeline()
    dit_accel.accelerate(pipe, cache=options_for(cache, "wan-t2v"))
    fresh = sample(pipe, steps=STEPS)
    for last in range(STEPS):

        def stop(pipe: Any, step: int, time: Any, given: dict, last: int = last) -> dict:
            if step == last:
                raise Stop
            return given

        with pytest.raises(Stop):
            sample(pipe, steps=STEPS, seed=1, callback_on_step_end=stop)
        assert torch.equal(sample(pipe, steps=STEPS), fresh), f"step {last}"


def test_a_run_that_broke_off_leaves_nothing_to_other_sizes(cache, options_for, sample):
    """Another batch and another grid right behind a run that broke off."""
    pipe = tiny_wan_pipeline()
    others: list[dict[str, Any]] = [{"batch": 2}, {"width": 96}, {"steps": 8}]
    dit_accel.accelerate(pipe, cache=options_for(cache, "wan-t2v"))
    for other in others:
        fresh = sample(pipe, **{"steps": STEPS, **other})
        with stop_at(pipe, "behind the blocks", 5) as stopped:
            sample(pipe, steps=STEPS, seed=1)
        assert stopped and torch.equal(sample(pipe, **{"steps": STEPS, **other}), fresh), other


@contextmanager
def stop_at(pipe: Any, place: str, time: int) -> Iterator[list[int]]:
    """Break off what runs here when a place is reached for this time; whether it was stands in the list then."""
    calls, stopped = [0], []

    def stop(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == time:
            stopped.append(time)
            raise Stop

    hook = PLACES[place](pipe).register_forward_pre_hook(stop)
    try:
        with suppress(Stop):
            yield stopped
    finally:
        hook.remove()
