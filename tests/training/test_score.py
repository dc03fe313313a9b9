"""How replaceable each self-attention is: projections fitted by least squares, and the right layer found."""

from __future__ import annotations

import json
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
from dit_accel.training.fit import fit_projections
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
    options = {"count": 1, "fit": 1, "levels": 2, "seed": 0, **changed}
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
    runs = [tiny_wan_inputs(transformer, grid) for grid in ((2, 4, 6), (3, 4, 4))]
    fitted = fit_projections(transformer, [{**run, "return_dict": False} for run in runs])
    collected = collect(transformer, runs)
    for layer, (linear, dense) in collected.items():
        rows = torch.cat((linear, torch.ones(len(linear), 1, dtype=torch.float64)), 1)
        true = torch.linalg.lstsq(rows, dense).solution
        found = fitted.layers[layer]
        ours = linear @ found.weight.double().mT + found.bias.double()
        best = rows @ true
        error = [float((x - dense).square().mean()) for x in (ours, best, linear)]
        assert error[0] <= 1.001 * error[1] + 1e-12, "no projection is nearer"
        assert error[0] < 0.9 * error[2], "nearer than none"


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
    plain = {**padded, **{name: padded[name][:, :11] for name in ("encoder_hidden_states", "encoder_attention_mask")}}
    first, second = (fit_projections(transformer, [{**run, "return_dict": False}]) for run in (padded, plain))
    assert first.spec.linear_layers == (0, 1)
    for layer, of in first.layers.items():
        torch.testing.assert_close(of.weight, second.layers[layer].weight, rtol=0, atol=1e-3)
        assert float((of.weight - torch.eye(len(of.bias))).abs().max()) > 0.05


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
    for changed, words in (({"count": 0}, "count = 0"), ({"fit": -1}, "fit = -1"), ({"levels": 0}, "levels = 0")):
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
