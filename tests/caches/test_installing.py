"""What may be asked for, and how caches come, take over and go."""

from __future__ import annotations

import copy

import pytest
from stepping import ALWAYS, Model, accelerate

import dit_accel
from dit_accel.errors import UsageError
from dit_accel.testing import (
    tiny_flux2_transformer,
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("esay", "Did you mean 'easy'"),
        ({"threshold": 0.1}, "needs its name"),
        ({"name": "easy", "treshold": 0.1}, "Did you mean 'threshold'"),
        ({"name": "easy", "threshold": -1}, "threshold=-1 is out of range"),
        ({"name": "easy", "threshold": "0.1"}, "threshold='0.1' is out of range"),
        ({"name": "easy", "schedule": "012"}, "schedule='012' is out of range"),
        ({"name": "easy", "schedule": "01"}, "the first of them 1"),
        ({"name": "easy", "schedule": "cond=11; uncond=01"}, "the first of them 1"),
        ({"name": "easy", "schedule": "11; uncond=10"}, "for each branch"),
        ({"name": "easy", "schedule": "cond=11; cond=10"}, "for each branch"),
        ({"name": "easy", "schedule": "=11"}, "for each branch"),
        ({"name": "easy", "schedule": True}, "schedule=True is out of range"),
        ({"name": "easy", "schedule": "11", "dry_run": True}, "exclude each other"),
        ({"name": "latent", "order": 3}, "order=3 is out of range"),
        ({"name": "first_block", "order": -1}, "order=-1 is out of range"),
        ({"name": "taylor", "over": "time"}, "over='time' is out of range"),
        ({"name": "dual_block", "fn": 0}, "fn=0 is out of range"),
        ({"name": "dual_block", "fn": 8}, "leave at least one"),
        ({"name": "mag"}, "needs ratios"),
        ({"name": "tea"}, "needs either model"),
        ({"name": "tea", "model": "wan"}, "Did you mean 'wan21"),
        ({"name": "tokens", "selector": "map"}, "selector='map' is out of range"),
        (3, "give a cache's name"),
    ],
)  # fmt: skip
def test_bad_options(given, message):
    model = Model()
    with pytest.raises(UsageError, match=message):
        accelerate(model, given)
    assert "_diffusers_hook" not in model.transformer.__dict__
    assert not any("_diffusers_hook" in block.__dict__ for block in model.transformer.blocks)


def test_a_second_cache_takes_over():
    model = Model()
    first = accelerate(model, {"name": "first_block", "threshold": 1e9, "min_steps": 0})
    second = accelerate(model, ALWAYS)
    for time in (900, 800, 700):
        model("cond", time)
    assert first.report().forwards == {} and second.report().forwards == {"computed": 2, "reused": 1}
    first.remove()  # does nothing any more
    model("cond", 600)
    assert second.report().forwards["reused"] == 2
    dit_accel.accelerate(model.transformer, keep=0.5, min_tokens=0)
    assert not second._caches[0].installed
    second.remove()
    assert "forward" not in model.transformer.__dict__


def test_blocks_that_are_no_one_stack():
    with pytest.raises(UsageError, match="easy or latent"):
        dit_accel.accelerate(tiny_flux2_transformer(), cache="first_block")


def test_a_cached_transformer_is_not_copied_in_silence():
    model = Model()
    handle = accelerate(model, "easy")
    with pytest.raises(UsageError, match="cannot be copied"):
        copy.deepcopy(model.transformer)
    handle.remove()
    copy.deepcopy(model.transformer)
