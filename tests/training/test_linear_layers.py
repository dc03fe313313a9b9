"""Layers that become linear attention alone: their gradients, how they lead over from dense, and going on exactly."""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dit_accel
from dit_accel import testing
from dit_accel.errors import UsageError
from dit_accel.sla.linear import project
from dit_accel.sla.weights import load_sla_weights, save_sla_weights
from dit_accel.training.distill import Distiller, DistillOptions, make_accelerator
from dit_accel.training.samples import LatentFolder
from dit_accel.training.sla import SlaOptions, make_trainable
from dit_accel.training.student import Student

OPTIONS = {"keep": 0.3, "block": 16}
FEATURES = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: nn.functional.elu(x) + 1, "relu": nn.functional.relu}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small operations."""


def make(family="wan", linear=(0,), random=True, **options):
    transformer = getattr(testing, f"tiny_{family}_transformer")().requires_grad_(True)
    trainable = make_trainable(transformer, SlaOptions(**{**OPTIONS, "linear_layers": linear, **options}))
    torch.manual_seed(1)
    for parameter in trainable.projections() if random else ():
        nn.init.normal_(parameter, std=0.3)
    return trainable, getattr(testing, f"tiny_{family}_inputs")(transformer)


def output(model, inputs):
    out = model(**inputs, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def gradients(model, inputs):
    model.zero_grad()
    output(model, inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pairs(query, key, value, layer, feature):
    """A linear layer as sums over pairs of tokens."""
    phi = FEATURES[feature]
    weights = phi(query) @ phi(key).mT
    return project(layer.proj_l, weights @ value / (weights.sum(-1, keepdim=True) + 1e-5)).to(query.dtype)


@pytest.mark.parametrize(("feature", "share"), [("softmax", 0.0), ("softmax", 0.3), ("elu", 0.0), ("relu", 0.6)])
def test_gradients_are_those_of_sums_over_pairs(monkeypatch, feature, share):
    """Through the whole transformer, for each of its parameters; the other layer is sparse."""
    trainable, inputs = make(feature=feature, mix=True)
    with trainable.blended(share):
        found = gradients(trainable, inputs)
    layers = trainable.layers

    def attend_linearly(query, key, value, layer, feature):
        return pairs(query, key, value, layers.by_number[str(layer)], feature)

    monkeypatch.setattr(layers, "attend_linearly", attend_linearly)
    with trainable.blended(share):
        true = gradients(trainable, inputs)
    assert found.keys() == true.keys() == dict(trainable.named_parameters()).keys()
    assert "layers.by_number.0.mix" not in found and "layers.by_number.1.mix" in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, true[name], rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert float(found["layers.by_number.0.proj_l.weight"].abs().max()) > 0


@torch.no_grad()
def test_a_blend_begins_dense_and_ends_linear():
    trainable, inputs = make(linear=(1,))
    other, _ = make(linear=(), dense_layers=(1,))
    other.layers.by_number["0"].load_state_dict(trainable.layers.by_number["0"].state_dict())
    linear = output(trainable, inputs)
    with trainable.blended(1.0):
        assert torch.equal(output(trainable, inputs), output(other, inputs)), "the layer that it replaces"
    with trainable.blended(0.0):
        assert torch.equal(output(trainable, inputs), linear)
    with trainable.blended(0.5):
        between = output(trainable, inputs)
    assert not torch.equal(between, linear) and torch.equal(output(trainable, inputs), linear)
    report = trainable.report()
    assert report.dense_reasons == {"blended with a linear layer in training": 2} and not report.fallbacks
    assert report.linear_calls == {1: 3} and report.sparse_calls == 5


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "flux", "sd3", "z_image"])
def test_other_families_have_them_too(family):
    """With padding, text in the same sequence, and processors of our own."""
    trainable, inputs = make(family)
    learnt = output(trainable, inputs)
    with torch.no_grad():
        torch.testing.assert_close(output(trainable, inputs), learnt, rtol=1e-4, atol=1e-5)
    report = trainable.report()
    assert report.linear_calls == {0: 2} and not report.fallbacks and not report.dense_calls
    assert float(gradients(trainable, inputs)["layers.by_number.0.proj_l.weight"].abs().max()) > 0


def test_checkpointed_gradients_of_a_blend_are_the_same():
    trainable, inputs = make()
    other = copy.deepcopy(trainable)
    other.transformer.enable_gradient_checkpointing()
    other.train()
    with trainable.blended(0.4):
        true = gradients(trainable, inputs)
    with other.blended(0.4):
        found = gradients(other, inputs)
    for name, gradient in true.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert other.report() == trainable.report(), "what is computed again is counted once"


def test_under_autocast_it_stays_near():
    trainable, inputs = make("hunyuan_video")
    true = gradients(trainable, inputs)
    with torch.autocast("cpu", torch.bfloat16), trainable.blended(0.2):
        low = gradients(trainable, inputs)
    with trainable.blended(0.2):
        true = gradients(trainable, inputs)
    name = "layers.by_number.0.proj_l.weight"
    assert low[name].dtype == torch.float32 and float((low[name] - true[name]).norm() / true[name].norm()) < 0.05


@torch.no_grad()
def test_weights_come_back(tmp_path):
    first, inputs = make(mix=True, linear=(-1,))
    true = output(first, inputs)
    save_sla_weights(tmp_path / "x.safetensors", first.weights())
    weights = load_sla_weights(tmp_path / "x.safetensors")
    assert weights.spec.linear_layers == (1,) and weights.layers[1].mix is None and weights.layers[0].mix is not None
    second = make_trainable(testing.tiny_wan_transformer(), SlaOptions.of(weights.spec, mix=True))
    second.load(weights)
    assert torch.equal(output(second, inputs), true)
    plain = testing.tiny_wan_transformer()
    with dit_accel.accelerate(plain, None, method="sla", weights=str(tmp_path / "x.safetensors"), min_tokens=0):
        torch.testing.assert_close(output(plain, inputs), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"linear": (2,)}, "linear_layers names layer 2, but this transformer has 2"),
        ({"linear": (0, 1), "dense_layers": (-1,)}, "both name layer 1: a layer stays dense or becomes linear"),
        ({"linear": (), "dense_layers": (0, 1)}, "names every layer"),
    ],
)
def test_layers_that_cannot_be_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        make(**options)


def test_weights_that_do_not_fit_change_nothing():
    trainable, _ = make()
    before = copy.deepcopy(trainable.state_dict())
    sparse, linear = make(linear=())[0].weights(), make(linear=(0, 1))[0].weights()
    for weights in (sparse, linear):
        with pytest.raises(UsageError, match=r"linear_layers .* give SlaOptions\(linear_layers="):
            trainable.load(weights)
    with pytest.raises(UsageError, match="layer 0 sparse, and it is to be linear"):
        trainable.load_linear(sparse)
    with pytest.raises(UsageError, match="with feature 'elu'"):
        trainable.load_linear(make(linear=(0, 1), feature="elu")[0].weights())
    with pytest.raises(UsageError, match="for 3 layers"):
        trainable.load_linear(replace(linear, spec=replace(linear.spec, n_layers=3)))
    assert all(torch.equal(x, before[name]) for name, x in trainable.state_dict().items())
    trainable.load_linear(linear)
    assert torch.equal(trainable.layers.by_number["0"].proj_l.weight, linear.layers[0].weight)
    assert torch.equal(trainable.layers.by_number["1"].proj_l.weight, before["layers.by_number.1.proj_l.weight"])
    for share in (-0.1, 1.1):
        with pytest.raises(UsageError, match="from 0 .linear. to 1 .dense."), trainable.blended(share):
            pass


# -- in a run

SLA = SlaOptions(keep=0.1, block=16, order="raster", mix=True, linear_layers=(1,))
HOW = DistillOptions(
    steps=4, batch=2, rate=1e-4, projection_rate=5e-3, mix_rate=0.5, warmup=3, ema=0.5, held_out=1, blend_steps=3
)


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator("no", cpu=True)


@pytest.fixture
def distil(tiny_latents: Path, accelerator, tmp_path: Path):
    def make(trains: str = "projection", name: str = "out", sla: SlaOptions = SLA, **changed) -> Distiller:
        student = Student(testing.tiny_wan_transformer(seed=1), sla, trains, rank=2)
        return Distiller(student, LatentFolder(tiny_latents), replace(HOW, **changed), accelerator, tmp_path / name)

    return make


def test_the_share_of_dense_falls_to_nothing():
    assert [HOW.share_of_dense(step) for step in range(5)] == [0.75, 0.5, 0.25, 0.0, 0.0]
    assert replace(HOW, blend_steps=0).share_of_dense(0) == 0


def test_the_error_falls_and_the_side_file_gives_it(distil):
    from dit_accel.training.compare import compare_ways

    distiller = distil(steps=20, sla=replace(SLA, linear_layers=(0, 1), mix=False), projection_rate=0.02)
    with torch.no_grad():  # in a random model attention is so even that linear attention is near it from the first
        torch.manual_seed(2)
        for parameter in distiller.student.sla.projections():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    record = distiller.run({})
    before, after = (record["velocity_error"][when]["overall"] for when in ("before", "after"))
    assert after < 0.5 * before
    ways = {"trained": {"method": "sla", "weights": str(distiller.out.weights)}}
    stock = testing.tiny_wan_transformer(seed=1)
    found = compare_ways(stock, ways, distiller.folder, distiller.held_out, levels=5, seed=HOW.seed)["trained"]
    assert found.error.overall == pytest.approx(after, rel=1e-3)
    assert found.report.linear_calls.keys() == {0, 1} and found.report.keep_achieved is None
    assert not found.report.plans and not found.report.sparse_calls and not found.report.dense_calls


@pytest.mark.parametrize("trains", ("lora", "full"))
def test_going_on_in_the_midst_of_a_blend_equals_never_having_stopped(distil, trains):
    whole, cut = distil(trains, "whole"), distil(trains, "cut")
    whole.run({})

    def interrupt(step: int, loss: float) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    assert cut.run({}, interrupt)["interrupted"] and cut.step == 2
    again = distil(trains, "cut")
    again.resume()
    again.run({})
    assert again.losses == whole.losses and again.before == whole.before
    ours, theirs = (load_file(d.out.weights) for d in (whole, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    reasons = whole.student.sla.report().dense_reasons
    assert reasons["blended with a linear layer in training"] == HOW.blend_steps, "a forward in each of these steps"
    linear = distil(trains, "linear", blend_steps=0)
    linear.run({})
    assert linear.losses != whole.losses, "the blend makes a difference"


def test_runs_that_cannot_be_are_refused(distil):
    with pytest.raises(UsageError, match="steps = 2 ends the run before its linear layers are linear, with step 3"):
        distil(steps=2)
    with pytest.raises(UsageError, match="blend_steps = 3 leads over to linear layers, and there are none"):
        distil(sla=replace(SLA, linear_layers=()))
    with pytest.raises(UsageError, match="blend_steps = -1"):
        replace(HOW, blend_steps=-1)
    distil(steps=3).run({})
    with pytest.raises(UsageError, match="blend_steps = 3, and 2"):
        distil(blend_steps=2).resume()
    with pytest.raises(UsageError, match="sla ="):
        distil(sla=replace(SLA, linear_layers=(0,))).resume()
