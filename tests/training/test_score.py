"""How replaceable each self-attention is: projections fitted by least squares, and the right layer found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_accel.errors import DitAccelError, EnvironmentProblem, UsageError
from dit_accel.sla.weights import load_sla_weights, save_sla_weights
from dit_accel.testing import (
    tiny_flux_transformer,
    tiny_hunyuan_video_inputs,
    tiny_hunyuan_video_transformer,
    tiny_wan_inputs,
    tiny_wan_transformer,
)
from dit_accel.training.fit import RIDGES, _solve, _Sums, fit_projections
from dit_accel.training.samples import LatentFolder
from dit_accel.training.score import best_layers, read_scores, score_layers, write_scores
from dit_accel.training.sla import SlaOptions, make_trainable


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small operations."""


def shaped(uniform: int, peaked: int):
    """A tiny Wan with one layer that attends to all keys alike, and one that attends to few."""
    transformer = tiny_wan_transformer(seed=1)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(transformer.blocks[uniform].attn1.to_q, name).zero_()
        transformer.blocks[peaked].attn1.norm_q.weight.mul_(30)
        for block in transformer.blocks:  # so that attention is a good part of what comes out
            block.attn1.to_out[0].weight.mul_(10)
    return transformer


def score(transformer, folder: Path, **changed):
    options = {"count": 1, "fit": 2, "levels": 2, "seed": 0, **changed}
    return score_layers(transformer, LatentFolder(folder), **options)


@pytest.mark.parametrize("fit", [0, 2])
@pytest.mark.parametrize(("uniform", "peaked"), [(0, 1), (1, 0)])
def test_uniform_attention_is_replaceable_and_peaked_is_not(tiny_latents: Path, uniform, peaked, fit):
    transformer = shaped(uniform, peaked)
    before = {name: x.clone() for name, x in transformer.state_dict().items()}
    processors = [id(m.processor) for m in transformer.modules() if hasattr(m, "processor")]
    scores = score(transformer, tiny_latents, fit=fit)
    assert scores.ranking == (uniform, peaked)
    errors = {layer: error.overall for layer, error in scores.errors.items()}
    assert errors[uniform] < 1e-8 and errors[peaked] > 1e-4
    assert (scores.projections is None) == (fit == 0)
    if fit:  # what is exact already needs no projection
        torch.testing.assert_close(scores.projections.layers[uniform].weight, torch.eye(12), rtol=0, atol=1e-3)
    assert processors == [id(m.processor) for m in transformer.modules() if hasattr(m, "processor")]
    assert not transformer._forward_hooks and not transformer._forward_pre_hooks
    assert all(torch.equal(x, before[name]) for name, x in transformer.state_dict().items())


def test_fitted_projections_are_those_of_least_squares():
    """Against torch's own solver, on what the layers' inputs give in the dense model; both heads share one."""
    transformer = shaped(0, 1)
    with torch.no_grad():
        transformer.blocks[0].attn1.to_q.weight.normal_()
    grids = ((2, 4, 6), (3, 4, 4), (2, 5, 5))
    samples = [[tiny_wan_inputs(transformer, grid, seed=n) for n in range(2)] for grid in grids]
    fitted = fit_projections(transformer, [[{**run, "return_dict": False} for run in runs] for runs in samples])
    collected = [collect(transformer, runs) for runs in samples]
    for layer, found in fitted.layers.items():
        of_layer = [sample[layer] for sample in collected]

        def left_out(ridge, of_layer=of_layer):
            rest = [(solve([*of_layer[:n], *of_layer[n + 1 :]], ridge), own) for n, own in enumerate(of_layer)]
            return sum(distance(change, *own) for change, own in rest)

        best = min(RIDGES, key=left_out)
        change = solve(of_layer, best)
        torch.testing.assert_close(found.weight.double() - torch.eye(12), change[:-1].mT, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.bias.double(), change[-1], rtol=0, atol=1e-3)
        assert best < math.inf and distance(change, *of_layer[0]) < distance(0 * change, *of_layer[0])


def solve(samples, ridge):
    """The change from the identity, as least squares with rows for the ridge."""
    linear, dense = (torch.cat(parts) for parts in zip(*samples, strict=True))
    size = linear.shape[1]
    if ridge == math.inf:
        return torch.zeros(size + 1, size, dtype=torch.float64)
    rows = with_one(linear)
    more = torch.eye(size + 1, dtype=torch.float64) * (ridge * linear.square().sum() / size).sqrt()
    aims = torch.cat((dense - linear, more.new_zeros(size + 1, size)))
    return torch.linalg.lstsq(torch.cat((rows, more)), aims).solution


def with_one(linear):
    return torch.cat((linear, linear.new_ones(len(linear), 1)), 1)


def distance(change, linear, dense):
    return float((linear + with_one(linear) @ change - dense).square().sum())


def test_what_a_few_samples_do_not_tell_stays_the_identity():
    """Two samples whose means lie in other directions: what the one says is of no use for the other."""
    torch.manual_seed(0)
    first, second = (torch.randn(1, 4, 1, 12).expand(-1, -1, 30, -1) for _ in range(2))  # each head's mean
    sums = [_Sums.of(x, x + torch.randn(1, 4, 1, 12) + 0.01 * torch.randn(1, 4, 30, 12)) for x in (first, second)]
    far = _solve(sums)
    assert float((far.weight - torch.eye(12)).abs().max()) < 0.3
    near = _solve([_Sums.of(x, 2 * x + 1) for x in (torch.randn(1, 4, 30, 12), torch.randn(1, 4, 30, 12))])
    torch.testing.assert_close(near.weight, 2 * torch.eye(12), rtol=0, atol=1e-3)
    torch.testing.assert_close(near.bias, torch.ones(12), rtol=0, atol=1e-3)
    with pytest.raises(UsageError, match="2 samples or more"):
        _solve(sums[:1])


def collect(transformer, runs):
    """What linear and dense attention give in each layer, `[rows, D]` in fp64, by a processor in diffusers' place."""
    from torch.nn import functional as F

    found = {}
    options = SlaOptions(keep=1.0, block=16, variant="all")
    trainable = make_trainable(transformer, options)

    def look(call, layout, query, key, value, plan):
        q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
        weights = q.softmax(-1) @ k.softmax(-1).mT
        linear = weights @ v / (weights.sum(-1, keepdim=True) + 1e-5)
        pair = linear.flatten(0, 2), F.scaled_dot_product_attention(q, k, v).flatten(0, 2)
        found.setdefault(call.layer, []).append(pair)

    trainable._engine.observer = look
    with torch.no_grad():  # a full plan and projections of zero: dense, but for rounding
        for run in runs:
            trainable(**run, return_dict=False)
    trainable.remove()
    return {layer: [torch.cat(parts) for parts in zip(*pairs, strict=True)] for layer, pairs in found.items()}


def test_padding_takes_no_part():
    """Text that is padded is fitted on as the same text without padding."""
    transformer = tiny_hunyuan_video_transformer()
    padded = tiny_hunyuan_video_inputs(transformer, text=19, valid=11)
    times = [torch.tensor([t]) for t in (900, 400)]
    plain = {**padded, **{name: padded[name][:, :11] for name in ("encoder_hidden_states", "encoder_attention_mask")}}
    first, second = (
        fit_projections(transformer, [[{**run, "return_dict": False, "timestep": t}] for t in times])
        for run in (padded, plain)
    )
    assert first.spec.linear_layers == (0, 1)
    for layer, of in first.layers.items():
        torch.testing.assert_close(of.weight, second.layers[layer].weight, rtol=0, atol=1e-3)
        assert float((of.weight - torch.eye(len(of.bias))).abs().max()) > 0.01


def test_scores_come_back(tiny_latents: Path, tmp_path: Path):
    scores = score(shaped(1, 0), tiny_latents, feature="elu")
    path = tmp_path / "new" / "scores.json"
    write_scores(path, scores, {"told": 1})
    found = read_scores(path)
    assert (found.ranking, found.feature, found.role) == (scores.ranking, "elu", "transformer")
    assert found.errors == scores.errors and json.loads(path.read_text())["told"] == 1
    assert torch.equal(found.projections.layers[0].weight, scores.projections.layers[0].weight)
    trainable = make_trainable(tiny_wan_transformer(), SlaOptions(feature="elu", linear_layers=(1,)))
    trainable.load_linear(found.projections)
    assert torch.equal(trainable.layers.by_number["1"].proj_l.bias, scores.projections.layers[1].bias)
    found.check_fits(trainable.transformer)
    with pytest.raises(UsageError, match="of 2 layers of a WanTransformer3DModel, and this is a Wan.* of 3: score"):
        found.check_fits(tiny_wan_transformer(num_layers=3))
    write_scores(tmp_path / "plain.json", replace(scores, projections=None), {})
    assert read_scores(tmp_path / "plain.json").projections is None


def test_the_best_are_chosen(tiny_latents: Path):
    scores = score(shaped(1, 0), tiny_latents, fit=0, levels=1)
    assert best_layers(scores, 1) == (1,) and best_layers(scores, 2) == (0, 1)
    assert best_layers(scores, 1, leave_out=(-1,)) == (0,)
    for count, leave_out in ((0, ()), (3, ()), (2, (0,))):
        with pytest.raises(UsageError, match=f"best:{count} is not possible: 1 to {2 - len(leave_out)}"):
            best_layers(scores, count, leave_out)


def test_what_cannot_be_scored_is_refused(tiny_latents: Path, tmp_path: Path):
    transformer = tiny_wan_transformer()
    for changed in ({"count": 0}, {"fit": -1}, {"fit": 1}, {"levels": 0}):
        words = " = ".join(map(str, *changed.items()))
        with pytest.raises(UsageError, match=words):
            score(transformer, tiny_latents, **changed)
    with pytest.raises(DitAccelError, match="holds 6 samples, and scoring 4 with projections fitted on 3 others"):
        score(transformer, tiny_latents, count=4, fit=3)
    with pytest.raises(UsageError, match="feature map of SLA 'sigmoid'"):
        score(transformer, tiny_latents, feature="sigmoid")
    with pytest.raises(UsageError, match="latents of a WanTransformer3DModel, and this is a Flux"):
        score(tiny_flux_transformer(), tiny_latents)
    with pytest.raises(EnvironmentProblem, match="cannot read the scores"):
        read_scores(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(EnvironmentProblem, match="no record of `finetune_sla.py score`"):
        read_scores(tmp_path / "other.json")
    scores = score(transformer, tiny_latents, levels=1)
    with pytest.raises(UsageError, match="must end in .json"):
        write_scores(tmp_path / "scores", scores, {})
    write_scores(tmp_path / "s.json", scores, {})
    (tmp_path / "s.safetensors").unlink()
    with pytest.raises(EnvironmentProblem, match="cannot read .*s.safetensors"):
        read_scores(tmp_path / "s.json")
    save_sla_weights(tmp_path / "s.safetensors", scores.projections)
    assert load_sla_weights(tmp_path / "s.safetensors").spec.linear_layers == (0, 1)
