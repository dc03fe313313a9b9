"""Rules, plans that serve several steps or both branches, and the arrangement a method brings."""

from dataclasses import replace

import pytest
import torch

import dit_accel
from dit_accel.errors import UnknownNameError, UsageError
from dit_accel.options import SparseOptions
from dit_accel.plan import BlockPlan
from dit_accel.planner import KeptPlan
from dit_accel.rules import Rule
from dit_accel.testing import tiny_wan_pipeline
from dit_accel.trajectory import Call

SMALL = {"block": 16, "min_tokens": 0, "order": "tiles"}


def sample(pipe, steps=6, **call):
    arguments = {
        **dict(
            prompt=["a red star"], negative_prompt=["blurry"], guidance_scale=5.0, num_inference_steps=steps
        ),
        **dict(
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            height=96,
            width=112,
            num_frames=9,
        ),
    }
    return pipe(**{**arguments, **call}).frames


@pytest.fixture
def pipe():
    return tiny_wan_pipeline()


def test_a_rule_holds_where_it_says():
    rule = Rule(above=0.5, below=0.9, layers=(0, -1), values={"keep": 0.5})
    assert rule.holds(0.5, 0, 4) and rule.holds(0.89, 3, 4)
    assert not rule.holds(0.9, 0, 4) and not rule.holds(0.49, 0, 4) and not rule.holds(0.6, 1, 4)
    assert Rule(dense=True).holds(1.0, 7, 8)


def test_rules_change_the_method_by_noise_and_layer(pipe):
    rules = [{"above": 0.8, "keep": 0.9}, {"layers": [-1], "keep": 0.6}]
    with dit_accel.accelerate(
        pipe, method="pooled", keep=0.3, neighbours=None, rules=rules, **SMALL
    ) as handle:
        seen = {}
        handle.observe(lambda call, layout, q, k, v, plan: seen.update(
            {(call.noise >= 0.8, call.layer): (round(float(plan.counts.float().mean())), layout.n_blocks)}
        ))  # fmt: skip
        sample(pipe)
    n = next(iter(seen.values()))[1]
    wanted = {(True, 0): 0.9, (True, 1): 0.6, (False, 0): 0.3, (False, 1): 0.6}  # later rules win
    assert {place: count for place, (count, _) in seen.items()} == {
        place: -int(-keep * n // 1) for place, keep in wanted.items()
    }


def test_a_dense_rule_is_planned(pipe):
    with dit_accel.accelerate(pipe, keep=0.3, rules=[{"layers": [0], "dense": True}], **SMALL) as handle:
        sample(pipe, steps=2)
        report = handle.report()
    assert report.dense_reasons == {"a rule": 4} and report.sparse_calls == 4 and not report.fallbacks


def test_a_plan_serves_several_steps(pipe):
    with dit_accel.accelerate(pipe, keep=0.4, neighbours=None, predict_every=3, **SMALL) as handle:
        plans = {}
        handle.observe(lambda call, layout, q, k, v, plan: plans.update(
            {(call.branch, call.step, call.layer): plan.to_mask()}
        ))  # fmt: skip
        sample(pipe, steps=5)
        report = handle.report()
    assert report.plans == {"predicted": 2 * 2 * 2, "carried over": 3 * 2 * 2} and report.bytes_held > 0
    for branch in ("cond", "uncond"):
        first, second, third, fourth, fifth = (plans[branch, step, 0] for step in range(5))
        assert torch.equal(first, second) and torch.equal(first, third) and torch.equal(fourth, fifth)
        assert any(not torch.equal(plans[branch, 0, layer], plans[branch, 3, layer]) for layer in (0, 1))


def test_a_run_after_another_predicts_anew(pipe):
    with dit_accel.accelerate(pipe, keep=0.4, predict_every=100, **SMALL) as handle:
        alone = sample(pipe)
        sample(pipe, prompt=["something else"])
        assert torch.equal(sample(pipe), alone)
        assert handle.report().plans["predicted"] == 3 * 2 * 2


def test_drift_of_the_noise_level_asks_for_a_new_plan(pipe):
    with dit_accel.accelerate(pipe, keep=0.4, predict_every=100, predict_drift=0.0, **SMALL) as handle:
        sample(pipe)
        assert "carried over" not in handle.report().plans


def test_branches_share_a_plan_only_where_that_is_allowed(pipe):
    with dit_accel.accelerate(pipe, keep=0.4, share_plans=True, **SMALL) as handle:
        plans = {}
        handle.observe(lambda call, layout, q, k, v, plan: plans.update(
            {(call.branch, call.step, call.layer): plan.to_mask()}
        ))  # fmt: skip
        sample(pipe, steps=2)
        assert handle.report().plans == {"predicted": 4, "carried over": 4}
    assert torch.equal(plans["cond", 1, 1], plans["uncond", 1, 1])
    assert not torch.equal(plans["cond", 0, 1], plans["cond", 1, 1])


def test_carried_plans_compensate_as_predicted_ones(pipe):
    options = dict(method="rectified", keep=0.3, top_p=None, neighbours=None, anchor=False, **SMALL)
    with dit_accel.accelerate(pipe, predict_every=2, **options) as handle:
        weights = {}
        handle.observe(
            lambda call, layout, q, k, v, plan: weights.update({(call.branch, call.step, call.layer): plan})
        )
        sample(pipe, steps=2)
    first, second = weights["cond", 0, 0], weights["cond", 1, 0]
    assert torch.equal(first.coarse, second.coarse) and torch.equal(first.to_mask(), second.to_mask())
    assert first.coarse.isfinite().any()


def test_a_method_brings_its_arrangement_unless_asked(pipe):
    with dit_accel.accelerate(pipe, method="rectified", keep=0.3, min_tokens=0) as handle:
        sample(pipe, steps=1)
        assert set(handle.report().token_orders) == {"gilbert"}
    with dit_accel.accelerate(pipe, method="rectified", keep=0.3, min_tokens=0, order="raster") as handle:
        sample(pipe, steps=1)
        assert set(handle.report().token_orders) == {"raster"}
    with dit_accel.accelerate(pipe, keep=0.3, min_tokens=0, tile=(1, 4, 4)) as handle:
        shapes = []
        handle.observe(lambda call, layout, *rest: shapes.append(layout.sizes.tolist()))
        sample(pipe, steps=1)
    assert shapes[0][0] == 16 and sum(shapes[0]) == 3 * 6 * 7


def test_an_observer_leaves_no_trace(pipe):
    with dit_accel.accelerate(pipe, keep=0.3, **SMALL) as handle:
        alone = sample(pipe, steps=2)
        seen = []
        handle.observe(lambda *told: seen.append(told))
        assert torch.equal(sample(pipe, steps=2), alone) and len(seen) == 8
        handle.observe(None)
        sample(pipe, steps=1)
        assert len(seen) == 8


def test_what_is_never_predicted_cannot_be_carried(pipe):
    for options in ({"predict_every": 2}, {"share_plans": True}):
        with pytest.raises(UsageError, match="'lite' learns each plan"):
            dit_accel.accelerate(pipe, method="lite", **options)
    with dit_accel.accelerate(pipe, method="lite", threshold=-1, **SMALL) as handle:
        sample(pipe, steps=3)
        report = handle.report()
    assert report.keep_per_step[0] == 1 and report.keep_per_step[2] < 1
    assert report.bytes_held > 0


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({}, UsageError, "changes nothing"),
        ({"above": 0.5}, UsageError, "changes nothing"),
        ({"above": 2, "keep": 0.5}, UsageError, "above=2 is not possible"),
        ({"below": True, "keep": 0.5}, UsageError, "below=True is not possible"),
        ({"layers": ["a"], "keep": 0.5}, UsageError, "list of whole numbers"),
        ({"keap": 0.5}, UnknownNameError, "Did you mean 'keep'"),
        ({"keep": 1.5}, UsageError, "keep=1.5"),
        ({"layers": [7], "keep": 0.5}, UsageError, "this transformer has 2"),
        ("keep", UsageError, "write each rule as a table"),
    ],
)
def test_bad_rules_get_one_clear_error(pipe, rule, error, message):
    with pytest.raises(error, match=message):
        dit_accel.accelerate(pipe, keep=0.3, rules=[rule], **SMALL)


def test_options_come_back_from_their_mapping():
    options = SparseOptions.from_mapping(
        dict(
            keep=0.3,
            rules=[dict(above=0.9, layers=[0], keep=0.5), dict(below=0.1, dense=True)],
            tile=[1, 8, 8],
        )
    )
    assert SparseOptions.from_mapping(options.to_mapping()) == options
    assert options.to_mapping()["rules"] == [
        {"above": 0.9, "layers": [0], "keep": 0.5},
        {"below": 0.1, "dense": True},
    ]
    for bad in ({"tile": [1, 8]}, {"predict_every": 0}, {"predict_drift": 2}, {"share_plans": 1}):
        with pytest.raises(UsageError, match="is not possible"):
            SparseOptions.from_mapping({"keep": 0.3, **bad})


@pytest.mark.parametrize("blocks", [1, 7, 8, 13, 33])
def test_what_a_kept_plan_skips_comes_back(blocks):
    starts = [0, *range(1, blocks + 1)]
    mask = torch.rand(2, 3, blocks, blocks) < 0.4
    plan = replace(BlockPlan.from_mask(mask, starts, starts), skipped=~mask & (torch.rand(mask.shape) < 0.5))
    kept = KeptPlan()
    kept.keep(plan, Call(1, "cond", 0, 0.5, (1, 1, blocks), (("video", 0, blocks),), "transformer", 1, 0))
    assert torch.equal(kept.plan().skipped, plan.skipped) and torch.equal(kept.plan().to_mask(), mask)
    assert kept.skipped.numel() == 2 * 3 * blocks * -(-blocks // 8)
