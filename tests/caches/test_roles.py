"""A cache whose options differ by expert, in runs of eight steps of which the first expert makes five."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.caches import load_cache
from dit_accel.testing import tiny_wan_pipeline

STEPS, FIRST, SECOND = 8, 5, 3
BOTH = 2 * STEPS  # forwards, of two branches of guidance
LATENT = {"name": "latent", "threshold": 1e9, "min_steps": 0}  # reuses whatever a limit does not forbid


@pytest.fixture
def pipe() -> Any:
    pipe = tiny_wan_pipeline(two_experts=True)
    pipe.register_to_config(boundary_ratio=0.75)
    return pipe


def test_the_common_values_said_of_each_role_change_nothing(cache, pipe, options_for, sample):
    options = options_for(cache, "wan-two-experts")
    with dit_accel.accelerate(pipe, cache=options) as handle:
        common, decided = sample(pipe, steps=STEPS), handle.decisions()
    own = {key: value for key, value in options.items() if key != "name"}
    for roles in ({"transformer": own}, {"transformer": {}, "transformer_2": own}):
        with dit_accel.accelerate(pipe, cache={**options, **roles}) as handle:
            assert torch.equal(sample(pipe, steps=STEPS), common) and handle.decisions() == decided
    # nor is what all have in common looked at where both say their own
    own["warmup"] = load_cache(options).warmup
    aside = {**options, "warmup": 7, "transformer": own, "transformer_2": own}
    with dit_accel.accelerate(pipe, cache=aside) as handle:
        assert torch.equal(sample(pipe, steps=STEPS), common) and handle.decisions() == decided


def test_each_role_has_its_own_interval(pipe, sample):
    taylor = {"name": "taylor", "interval": 2, "warmup": 1, "min_steps": 0, "transformer_2": {"interval": 3}}
    handle = dit_accel.accelerate(pipe, cache=taylor)
    sample(pipe, steps=STEPS)
    # every other one of steps 0 to 4, and the first of 5 to 7; steps before an expert's first count as computed
    assert handle.decisions() == {"transformer": "10101", "transformer_2": "11111" + "100"}
    report = handle.report()
    assert report.forwards == {"computed": 8, "reused": 8}
    assert report.forwards_per_role == {
        "transformer": {"computed": 6, "reused": 4}, "transformer_2": {"computed": 2, "reused": 4},
    }  # fmt: skip
    assert report.roles == {"transformer_2": {"cache": {"interval": 3}}}
    assert "transformer_2 alone: cache.interval=3; 4 of 6 forwards reused" in str(report)
    assert report.to_dict()["roles"] == report.roles


def test_each_role_has_its_own_threshold(pipe, sample):
    """0 on the expert for the noisy steps, which then gives what it gives without a cache."""
    before: list[torch.Tensor] = []
    sample(pipe, steps=STEPS, callback_on_step_end=lambda _, __, ___, given: before.append(given["latents"]) or {})
    handle = dit_accel.accelerate(pipe, cache={**LATENT, "transformer": {"threshold": 0}})
    after: list[torch.Tensor] = []
    sample(pipe, steps=STEPS, callback_on_step_end=lambda _, __, ___, given: after.append(given["latents"]) or {})
    # warm-up: the first two steps of the second expert
    assert handle.decisions() == {"transformer": "11111", "transformer_2": "11111" + "110"}
    # step 7 alone is made up
    assert all(torch.equal(*pair) for pair in zip(before[:7], after[:7], strict=True))
    assert not torch.equal(before[7], after[7])
    assert handle.report().computed_reasons["above the threshold"] == 2 * (FIRST - 2)


@pytest.mark.parametrize("off", ["transformer", "transformer_2"])
def test_a_cache_off_for_one_role_is_counted(cache, off, pipe, options_for, sample):
    options = options_for(cache, "wan-two-experts")
    handle = dit_accel.accelerate(pipe, cache={**options, off: False})
    out, report = sample(pipe, steps=STEPS), handle.report(clear=True)
    forwards = 2 * (FIRST if off == "transformer" else SECOND)
    assert report.computed_reasons[f"the cache is off for {off}"] == forwards
    assert sum(report.forwards.values()) == BOTH and report.forwards_per_role[off] == {"computed": forwards}
    assert report.forwards["reused"] > 0 and f"{off} alone: cache off; 0 of {forwards}" in str(report)
    assert torch.equal(sample(pipe, steps=STEPS), out)
    handle.remove()
    registries = (vars(module).get("_diffusers_hook") for module in getattr(pipe, off).modules())
    assert not any(registry.hooks for registry in registries if registry is not None)
    with dit_accel.accelerate(pipe, cache={**options, off: {"threshold": 0}}):
        assert torch.equal(sample(pipe, steps=STEPS), out)


def test_each_role_may_have_another_cache(pipe, sample):
    caches = {**LATENT, "transformer_2": {"name": "taylor", "interval": 2, "warmup": 1, "threshold": 1}}
    handle = dit_accel.accelerate(pipe, cache=caches)
    out = sample(pipe, steps=STEPS)
    assert [cache.cache.name for cache in handle._caches] == ["latent", "taylor"]
    assert handle.decisions() == {"transformer": "11000", "transformer_2": "11111" + "101"}
    assert torch.equal(sample(pipe, steps=STEPS), out)


def test_what_both_decided_is_replayed(pipe, sample):
    handle = dit_accel.accelerate(pipe, cache={**LATENT, "max_consecutive": 1, "transformer_2": {"warmup": 3}})
    alone, decided = sample(pipe, steps=STEPS), handle.decisions()
    assert decided == {"transformer": "11010", "transformer_2": "1" * 8}
    handle.remove()
    own = {role: {"schedule": schedule} for role, schedule in decided.items()}
    handle = dit_accel.accelerate(pipe, cache={**LATENT, "threshold": 0, **own})
    assert torch.equal(sample(pipe, steps=STEPS), alone) and handle.decisions() == decided


@pytest.mark.parametrize("module", ["transformer", "transformer_2"])
@pytest.mark.parametrize("own", [{"transformer": False}, {"transformer_2": {"warmup": 1}}], ids=str)
def test_a_run_that_broke_off_leaves_nothing(own, module, pipe, sample):
    dit_accel.accelerate(pipe, cache={"name": "taylor", "interval": 2, "warmup": 2, "min_steps": 0, **own})
    fresh = sample(pipe, steps=STEPS)

    def stop(module: Any, args: tuple) -> None:
        raise KeyboardInterrupt

    hook = getattr(pipe, module).proj_out.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        sample(pipe, steps=STEPS, seed=1)
    hook.remove()
    assert torch.equal(sample(pipe, steps=STEPS), fresh)
