"""The drift guard: what it measures, what it raises, and that a run knows nothing of the one before."""

import copy

import pytest
import torch
from torch.nn import functional as F

from dit_accel import SparseOptions, testing
from dit_accel.errors import UsageError
from dit_accel.guards import attempt, drift
from dit_accel.testing import tiny_wan_pipeline

ALWAYS = {"drift_every": 1, "drift_limit": 1e-6}
NEVER = {"drift_every": 1, "drift_limit": 1e6}
COMPARED = "calls compared with dense attention"
STEPS = 4
KEEPS, BRANCHES = ("0.6", "0.9"), ("cond", "uncond")


def test_it_measures_sparse_against_dense_and_changes_nothing_below_the_limit(pipe, sample, accelerate):
    """The figure is that of attention computed here, from what an observer is told and what the layer gives out."""
    with accelerate(pipe):
        plain = sample(pipe)
    errors, given = {}, {}

    def note(call, layout, query, key, value, plan):
        dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
        given.update(call=call, dense=dense)

    watch = drift.Drift.watch

    def compare(self, out, dense, query, now, tally):
        rows = torch.linspace(0, 83, 64).round().long()
        true = given["dense"][:, rows]
        error = float((out[:, rows] - true).norm() / true.norm())
        errors[now.branch] = max(errors.get(now.branch, 0), error)
        return watch(self, out, dense, query, now, tally)

    drift.Drift.watch = compare
    try:
        with accelerate(pipe, **NEVER) as handle:
            handle.observe(note)
            assert torch.equal(sample(pipe), plain)
            report = handle.report()
    finally:
        drift.Drift.watch = watch
    assert report.guards == {COMPARED: 18} and not report.fallbacks  # 3 steps, 2 branches, 3 layers
    assert set(report.drift) == {"transformer, cond", "transformer, uncond"}
    for branch, error in errors.items():
        assert report.drift[f"transformer, {branch}"] == pytest.approx(error, rel=1e-4) and 0.01 < error < 1
    assert f"of transformer, cond: {report.drift['transformer, cond']:.3g}" in str(report)
    assert report.to_dict()["drift"] == report.drift


def test_it_raises_keep_for_the_rest_of_the_run(pipe, sample, accelerate):
    with accelerate(pipe) as handle:
        plain = sample(pipe, steps=STEPS)
        steady = handle.report().keep_per_step
    with accelerate(pipe, **ALWAYS) as handle:
        raised = sample(pipe, steps=STEPS)
        report = handle.report(clear=True)
        # x 1.5 a step at most, for each branch by itself; 0.9 is all of the six blocks, and no drift
        raises = {f"keep raised to {keep} for transformer, {branch}": 1 for keep in KEEPS for branch in BRANCHES}
        assert report.guards == {COMPARED: 3 * 2 * STEPS, **raises}
        kept = list(report.keep_per_step.values())
        assert kept == sorted(kept) and kept[0] > steady[0] and kept[-1] == 1.0 and max(steady.values()) < 0.6
        assert report.keep_requested == 0.4
        assert not torch.equal(raised, plain)
        # the next run begins where this one did
        assert torch.equal(sample(pipe, steps=STEPS), raised)
        again = handle.report()
        assert again.guards == report.guards and again.keep_per_step == report.keep_per_step


def test_it_never_raises_keep_above_all(pipe, sample, accelerate):
    with accelerate(pipe, keep=0.8, **ALWAYS) as handle:
        sample(pipe, steps=STEPS)
        assert set(handle.report().guards) == {COMPARED, *(f"keep raised to 1 for transformer, {b}" for b in BRANCHES)}


def test_only_the_branch_that_drifts_is_raised(pipe, sample, accelerate):
    later = {"dense_layers": (0,)}  # the first layer has not seen the prompt yet
    with accelerate(pipe, **NEVER, **later) as handle:
        sample(pipe, steps=STEPS)
        worst = handle.report().drift
    low, high = sorted(worst.values())
    assert high > low
    (far,) = [place for place, error in worst.items() if error == high]
    with accelerate(pipe, drift_every=1, drift_limit=(low + high) / 2, **later) as handle:
        sample(pipe, steps=STEPS)
        raised = [name for name in handle.report().guards if name != COMPARED]
    assert raised and all(name.endswith(far) for name in raised)


def test_it_looks_in_every_nth_step_alone_and_at_other_layers_each_time(sample, accelerate, monkeypatch):
    pipe = tiny_wan_pipeline(transformer={"num_layers": 9})  # a third of the layers at a time
    now, looked, apart = [], {}, drift._apart

    def look(out, true):
        step, branch, layer = now
        looked.setdefault((step, branch), []).append(layer)
        assert out.shape == true.shape == (1, 64, 2, 12)
        return apart(out, true)

    monkeypatch.setattr(drift, "_apart", look)
    with accelerate(pipe, drift_every=2, drift_limit=1e6) as handle:
        handle.observe(lambda call, *rest: now.__setitem__(slice(None), [call.step, call.branch, call.layer]))
        sample(pipe, steps=5)
    of_both = {0: [0, 3, 6], 2: [1, 4, 7], 4: [2, 5, 8]}
    assert looked == {(step, branch): layers for step, layers in of_both.items() for branch in ("cond", "uncond")}


def test_plans_that_are_carried_over_are_made_anew(pipe, sample, accelerate):
    with accelerate(pipe, predict_every=10, drift_every=2, drift_limit=1e-6) as handle:
        sample(pipe, steps=STEPS)
        report = handle.report()
    assert report.keep_per_step[0] < report.keep_per_step[2]
    assert report.plans["predicted"] > 6 and report.plans["carried over"] > 0


def test_branches_that_share_plans_share_what_is_raised(pipe, sample, accelerate):
    with accelerate(pipe, share_plans=True, **ALWAYS) as handle:
        out = sample(pipe, steps=STEPS)
        report = handle.report()
        assert set(report.drift) == {"transformer, every branch"}
        assert report.guards["keep raised to 0.6 for transformer, every branch"] == 1
        assert torch.equal(sample(pipe, steps=STEPS), out)


def test_experts_have_a_keep_each(sample, accelerate):
    pipe = tiny_wan_pipeline(two_experts=True)
    limits = {"transformer_2": {"drift_every": 1, "drift_limit": 1e-6}}
    with accelerate(pipe, **limits) as handle:
        sample(pipe, steps=STEPS)
        report = handle.report()
    assert set(report.drift) == {"transformer_2, cond", "transformer_2, uncond"}
    assert report.keep_per_role["transformer"] < report.keep_per_role["transformer_2"]


def test_rules_are_raised_from_what_they_say(pipe, sample, accelerate):
    rules = [{"layers": [0], "keep": 0.2}, {"layers": [2], "dense": True}]
    with accelerate(pipe, rules=rules, drift_every=2, drift_limit=1e-6) as handle:
        sample(pipe, steps=STEPS)
        guards, kept = handle.report().guards, handle.report().keep_per_layer
    # the first layer is the one that is looked at first, so that its keep is the one that is told
    assert guards["keep raised to 0.3 for transformer, cond"] == 1 and kept[0] < kept[1]


def test_joint_attention_and_padding(accelerate):
    """The image's tokens alone are looked at, so that padding is no error."""
    transformer = testing.tiny_hunyuan_video_transformer()
    inputs = testing.tiny_hunyuan_video_inputs(transformer, text=19, valid=(3, 11), batch=2)
    with accelerate(transformer, keep=1.0, **NEVER) as handle, torch.no_grad():
        transformer(**inputs, return_dict=False)
        assert max(handle.report().drift.values()) < 1e-5
    transformer = testing.tiny_qwen_image_transformer()  # its text stands first
    inputs = testing.tiny_qwen_image_inputs(transformer, text=19, valid=(17, 5), batch=2)
    with accelerate(transformer, keep=1.0, **NEVER) as handle, torch.no_grad():
        transformer(**inputs, return_dict=False)
        report = handle.report()
    assert report.guards == {COMPARED: 2} and max(report.drift.values()) < 1e-5


def test_a_copy_has_a_guard_of_its_own(accelerate):
    transformer = testing.tiny_wan_transformer()
    inputs = testing.tiny_wan_inputs(transformer)
    handle = accelerate(transformer, **ALWAYS)
    with torch.no_grad():
        transformer(**inputs)
        double = copy.deepcopy(transformer)
        engine = double.blocks[0].attn1.processor.engine
        double(**inputs)
    ours, its = handle.report(), engine.report()
    assert ours.guards == its.guards and ours.drift == its.drift and ours.runs == its.runs == 1


def test_a_look_for_which_there_is_no_memory_is_left_out(pipe, sample, accelerate, monkeypatch):
    with accelerate(pipe):
        plain = sample(pipe)

    def run_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(drift, "_apart", run_out)
    with accelerate(pipe, **ALWAYS) as handle:
        assert torch.equal(sample(pipe), plain)
        assert handle.report().guards == {attempt.NOT_COMPARED: 18} and not handle.report().fallbacks


BAD = {
    "no keep": ({"method": "lite", "keep": None, **ALWAYS}, "raises keep where attention drifts, and method 'lite'"),
    "none given": ({"keep": None, "top_p": 0.5, **ALWAYS}, "give keep= to one of .*pooled"),
    "no limit": ({"drift_every": 2}, "go together"),
    "no steps": ({"drift_limit": 0.2}, "go together"),
    "zero": ({"drift_every": 0, "drift_limit": 0.2}, "drift_every=0 is not possible"),
    "nothing": ({"drift_every": 1, "drift_limit": 0}, "drift_limit=0 is not possible"),
    "text": ({"drift_every": "2", "drift_limit": 0.2}, "drift_every='2' is not possible"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(name, accelerate):
    options, words = BAD[name]
    transformer = testing.tiny_wan_transformer()
    stock = transformer.attn_processors
    with pytest.raises(UsageError, match=words):
        accelerate(transformer, **options)
    assert all(transformer.attn_processors[name] is processor for name, processor in stock.items())


def test_presets_may_have_it():
    options = SparseOptions.from_mapping({"keep": 0.3, "drift_every": 4, "drift_limit": 0.2})
    assert SparseOptions.from_mapping(options.to_mapping()) == options
    assert SparseOptions().drift_every is None and SparseOptions().drift_limit is None
