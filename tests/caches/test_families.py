"""Laws of every cache, on every family it can serve."""

from __future__ import annotations

import pytest
import torch


class Stop(Exception):
    pass


def test_threshold_zero_is_no_cache(pair):
    stock = pair.sample()
    handle = pair.install(threshold=0)
    assert torch.equal(pair.sample(), stock)
    report = handle.report()
    assert report.forwards == {"computed": pair.bench.family.forwards * 8}
    handle.remove()
    assert torch.equal(pair.sample(), stock)


def test_some_steps_are_reused_and_runs_are_strangers(pair):
    stock = pair.sample()
    handle = pair.install()
    alone = pair.sample()
    forwards = handle.report(clear=True).forwards
    assert forwards["reused"] >= pair.bench.family.forwards * 2, forwards
    assert not torch.equal(alone, stock) and torch.isfinite(alone).all()
    pair.sample(seed=2, steps=5, batch=2)
    assert torch.equal(pair.sample(), alone)
    pair.sample(seed=2, other=True)
    assert torch.equal(pair.sample(), alone)
    handle.report(clear=True)
    assert torch.equal(pair.sample(), alone)
    assert handle.report().forwards == forwards


@pytest.mark.parametrize("at_call", range(1, 7))
def test_a_run_after_an_exception_is_as_fresh(pair, at_call):
    pair.install()
    fresh = pair.sample()
    calls = [0]

    def stop(module, args):
        calls[0] += 1
        if calls[0] == at_call:
            raise Stop

    hook = pair.bench.attentions()[0].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        pair.sample(steps=20)
    hook.remove()
    assert torch.equal(pair.sample(), fresh)


def test_rows_of_a_batch_do_not_change_the_format(pair):
    """A batch is one decision; its rows are computed and made up together."""
    handle = pair.install()
    out = pair.sample(batch=2)
    assert out.shape[0] == 2 and handle.report().forwards["reused"]


def test_removal_is_exact(pair):
    transformers = pair.bench.transformers()
    before = [dict(module.__dict__) for t in transformers for module in t.modules()]
    handle = pair.install()
    pair.sample()
    handle.remove()
    handle.remove()
    for t in transformers:
        for module in t.modules():
            assert "forward" not in module.__dict__
            registry = module.__dict__.get("_diffusers_hook")
            assert registry is None or not registry.hooks
    after = [dict(module.__dict__) for t in transformers for module in t.modules()]
    for some, other in zip(before, after, strict=True):
        assert some.keys() == other.keys() - {"_diffusers_hook"} | (some.keys() & {"_diffusers_hook"})


@pytest.mark.one_schedule
def test_a_recorded_run_is_replayed(pair):
    handle = pair.install()
    alone, decided = pair.sample(), handle.decisions()
    handle.remove()
    assert "0" in decided["transformer"]
    handle = pair.install(schedule=decided["transformer"], threshold=0)
    assert torch.equal(pair.sample(), alone)
    assert handle.decisions() == decided


def test_a_dry_run_computes_everything_and_knows_the_error(pair):
    stock = pair.sample()
    handle = pair.install(dry_run=True)
    assert torch.equal(pair.sample(), stock)
    trials = handle.trials()
    assert trials and handle.report().forwards == {"computed": pair.bench.family.forwards * 8}
    assert all(trial.error >= 0 and trial.expected >= 0 for trial in trials)
