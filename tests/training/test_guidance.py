"""The guided velocity: which branch is which, the loss of both, how it is measured; and what has none is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.preset import GenerateOptions
from dit_accel.testing import (
    tiny_flux_with_text,
    tiny_sd3_with_text,
    tiny_wan_pipeline,
    tiny_wan_transformer,
)
from dit_accel.training.compare import compare_ways, share_plans, ways_to_attend
from dit_accel.training.distill import Distiller, DistillOptions, make_accelerator
from dit_accel.training.draws import Batch, Draws, generator
from dit_accel.training.guidance import Guidance, read_guidance, why_no_guidance
from dit_accel.training.latents import make_latents
from dit_accel.training.samples import LatentFolder
from dit_accel.training.sla import SlaOptions
from dit_accel.training.sources import Prompts
from dit_accel.training.student import Student
from dit_accel.training.velocity import make_cases, measure_velocity

CPU, FP32 = torch.device("cpu"), torch.float32
SMALL = GenerateOptions(width=32, height=32, frames=1, steps=3, guidance=3.0)
TWO = Prompts(("a red ball", "two cats asleep"))
SLA = SlaOptions(keep=0.1, block=16, order="raster", mix=True)
HOW = DistillOptions(steps=1, batch=2, held_out=1, seed=4)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Small operations."""


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator("no", cpu=True)


@pytest.fixture
def distil(tiny_latents: Path, accelerator, tmp_path: Path):
    """A `Distiller` of a fresh student."""

    def make(folder: Path = tiny_latents, **changed) -> Distiller:
        student = Student(tiny_wan_transformer(seed=1), SLA, "projection")
        return Distiller(student, LatentFolder(folder), replace(HOW, **changed), accelerator, tmp_path / "out")

    return make


@pytest.fixture
def older(tiny_latents: Path, tmp_path: Path) -> Path:
    """A folder whose index does not tell the guidance."""
    shutil.copytree(tiny_latents, tmp_path / "older")
    path = tmp_path / "older" / "index.json"
    told = json.loads(path.read_text())
    assert told.pop("guidance") == 5.0 and told.pop("guidance_2") is None
    path.write_text(json.dumps(told))
    return path.parent


@pytest.mark.parametrize(("make", "conditional"), ((tiny_wan_pipeline, 0), (tiny_sd3_with_text, 1)))
def test_guidance_is_the_pipelines_own(make, conditional: int, tmp_path: Path) -> None:
    """What is made of a sample's two velocities is what the pipeline gives its scheduler."""
    pipe, given = make(), []
    folder = make_latents(pipe, TWO, SMALL, tmp_path, count=2, seed=0, model="tiny")
    guidance = read_guidance(folder)
    assert guidance == Guidance(3.0, conditional)
    step = pipe.scheduler.step

    def listen(velocity, timestep, latents, **others):
        given.append((velocity, timestep, latents))
        return step(velocity, timestep, latents, **others)

    pipe.scheduler.step = listen
    call = dict(width=32, height=32, num_inference_steps=3, guidance_scale=3.0, negative_prompt="")
    call |= dict(num_frames=1) if make is tiny_wan_pipeline else {}
    pipe(prompt=TWO.caption(0), **call, generator=torch.Generator().manual_seed(0), output_type="latent")
    aim, timestep, latents = given[0]
    rows, one = [], torch.ones(1)
    for condition in guidance.pair(folder.read(0).conditions):
        inputs = Batch(latents, latents, one, timestep.reshape(1), dict(condition)).inputs(CPU, FP32)
        with torch.no_grad():
            rows.append(pipe.transformer(**inputs)[0])
    torch.testing.assert_close(guidance.combine(torch.cat(rows)), aim, rtol=1e-4, atol=1e-5)


def test_a_pair_is_both_branches_at_the_place_of_the_row_it_replaces(tiny_latents: Path) -> None:
    folder = LatentFolder(tiny_latents)
    told = dict(batch=2, accumulate=1, noise="schedule", seed=1)
    for order in (0, 1):
        single = Draws(folder, range(5), **told).draw(3, 0, 0, 1)
        pairs = Draws(folder, range(5), **told, guidance=Guidance(5.0, order)).draw(3, 0, 0, 1)
        for name in ("latents", "noise", "sigma", "timestep"):
            held, twice = getattr(single, name), getattr(pairs, name)
            assert torch.equal(twice[0::2], held) and torch.equal(twice[1::2], held), name
        texts = pairs.arguments["encoder_hidden_states"]
        empty = folder.read(0).conditions[1]["encoder_hidden_states"]
        assert torch.equal(texts[1 - order], empty[0]) and torch.equal(texts[3 - order], empty[0])
        assert not torch.equal(texts[order], empty[0])
        branches = [int(torch.randint(2, (), generator=generator(1, "row", 6 + row))) for row in range(2)]
        drawn = [texts[2 * row + (branch ^ order)] for row, branch in enumerate(branches)]
        assert torch.equal(single.arguments["encoder_hidden_states"], torch.stack(drawn))


def test_the_loss_is_that_of_both_branches_and_of_what_guidance_makes_of_them(distil) -> None:
    distiller, stock, g = distil(guided=0.7), tiny_wan_transformer(seed=1), 5.0
    batch = distiller.draws.draw(0, 0, 0, 1)
    plain, guided = [], []
    for sample in range(2):
        errors = []
        for row in (2 * sample, 2 * sample + 1):
            words = {"encoder_hidden_states": batch.arguments["encoder_hidden_states"][row : row + 1]}
            alone = (getattr(batch, name)[row : row + 1] for name in ("latents", "noise", "sigma", "timestep"))
            inputs = Batch(*alone, words).inputs(CPU, FP32)
            with torch.no_grad():
                errors.append(distiller.student(**inputs) - stock(**inputs)[0])
        plain += [error.square().mean() for error in errors]
        guided.append((errors[1] + g * (errors[0] - errors[1])).square().mean() / (25 + 16))
    expected = torch.stack(plain).mean() + 0.7 * torch.stack(guided).mean()
    assert distiller.run({})["losses"] == [pytest.approx(expected.item(), rel=1e-3)]
    other = distil(guided=0.7, guidance=2.0)
    assert other.run({})["losses"][0] != pytest.approx(expected.item(), rel=1e-3)


def test_no_weight_is_the_plain_loss_of_drawn_branches_to_the_bit(distil, tiny_latents: Path) -> None:
    distiller = distil(guided=0.0)
    told = dict(batch=2, accumulate=1, noise="schedule", seed=4)
    inputs = Draws(LatentFolder(tiny_latents), range(5), **told).draw(0, 0, 0, 1).inputs(CPU, FP32)
    assert len(inputs["hidden_states"]) == 2
    loss = (distiller.student(**inputs) - distiller.student.teacher(**inputs)).square().mean().item()
    record = distiller.run({})
    assert record["losses"] == [loss] and record["options"]["guided"] == 0
    assert record["velocity_error"]["before"]["guided"]["overall"] > 0  # measured all the same


def test_where_two_branches_run_they_are_trained_by_themselves(distil) -> None:
    record = distil().run({})
    assert (record["options"]["guided"], record["options"]["guidance"]) == (4.0, 5.0)


def test_training_falls_in_guided_error(distil) -> None:
    distiller = distil(steps=20, projection_rate=5e-3, mix_rate=0.5, warmup=3, ema=0.5)
    record = distiller.run({})
    before, after = (record["velocity_error"][when]["guided"]["overall"] for when in ("before", "after"))
    assert after < 0.5 * before


def test_shared_errors_count_once_and_others_grow(tiny_latents: Path) -> None:
    folder, model, guidance = LatentFolder(tiny_latents), tiny_wan_transformer(seed=1), Guidance(5.0, 0)
    levels = [(0.9, 900.0), (0.5, 500.0)]
    noise = torch.randn(folder.index.shape, generator=torch.Generator().manual_seed(0))
    empty = folder.read(0).conditions[1]["encoder_hidden_states"]

    def aim(inputs):
        return model(**inputs)[0]

    def is_empty(inputs) -> bool:
        return torch.equal(inputs["encoder_hidden_states"], empty)

    def measure(change, order=guidance):
        cases = make_cases(folder, (1, 2), levels, device=CPU, dtype=FP32, seed=3, guidance=order)
        return measure_velocity(cases, lambda inputs: aim(inputs) + change(inputs), aim, levels, device=CPU)

    size, norms = noise.double().square().sum(), [0.0, 0.0]
    pairs = list(make_cases(folder, (1, 2), levels, device=CPU, dtype=FP32, seed=3, guidance=guidance))
    assert [is_empty(case.inputs) for case in pairs] == [False, True] * 4
    with torch.no_grad():
        for with_text, without in zip(pairs[0::2], pairs[1::2], strict=True):
            ours, theirs = aim(with_text.inputs).double(), aim(without.inputs).double()
            norms[with_text.level] += (theirs + 5 * (ours - theirs)).square().sum().item()
    for change, growth in (
        (lambda inputs: noise, 1),
        (lambda inputs: noise * (not is_empty(inputs)), 25),
        (lambda inputs: noise * is_empty(inputs), 16),
        (lambda inputs: noise * (-1) ** is_empty(inputs), 81),
    ):
        guided = measure(change).guided
        expected = [2 * growth * size.item() / norm for norm in norms]
        assert [error for _, error in guided.levels] == pytest.approx(expected, rel=1e-4)
        assert guided.overall == pytest.approx(4 * growth * size.item() / sum(norms), rel=1e-4)
    assert measure(lambda inputs: noise, None).guided is None
    assert measure(lambda inputs: noise, None).overall == pytest.approx(measure(lambda inputs: noise).overall)


def test_shared_plans_are_made_once_for_both_branches_of_one_sample(tiny_latents: Path) -> None:
    folder, model = LatentFolder(tiny_latents), tiny_wan_transformer(seed=1)
    ways = ways_to_attend(0.3, {"order": "raster", "block": 16})
    ways = {"pooled": ways["pooled"]} | share_plans({"pooled": ways["pooled"]})
    found = compare_ways(model, ways, folder, (0, 1), levels=1, seed=0, guidance=read_guidance(folder))
    own, shared = found["pooled"], found["pooled, shared plans"]
    assert shared.options["share_plans"] and shared.error.guided.overall > 0
    assert own.report.to_dict()["plans"] == {"predicted": 8}  # two layers, samples, branches
    assert shared.report.to_dict()["plans"] == {"predicted": 4, "carried over": 4}


def test_an_older_folder_needs_the_scale_and_is_gone_on_with(distil, older: Path) -> None:
    with pytest.raises(UsageError, match=r"give the pipeline's with --guidance G.* --guided 0"):
        distil(older)
    assert distil(older, guided=0.0).guidance is None
    distiller = distil(older, guidance=4.0)
    assert distiller.guidance == Guidance(4.0, 0) and distiller.guided == 4
    folder = LatentFolder(older)
    size = replace(SMALL, width=96, height=96, frames=9, steps=6, guidance=5.0)
    from dit_accel.training.sources import Scenes

    more = make_latents(tiny_wan_pipeline(), Scenes(0), size, older, count=7, seed=0, model="tiny")
    assert len(more) == 7 and more.index == folder.index


def test_models_of_one_branch_have_none(tmp_path: Path) -> None:
    folder = make_latents(tiny_flux_with_text(), TWO, SMALL, tmp_path, count=2, seed=0, model="tiny")
    told = "1 branch, and guidance is of two: FluxTransformer2DModel has it built in"
    assert told in why_no_guidance(folder)
    with pytest.raises(UsageError, match=f"{told}.*--guided 0"):
        read_guidance(folder, scale=3.0)


def test_a_model_of_one_branch_trains_without_unless_asked(accelerator, tmp_path: Path) -> None:
    pipe = tiny_wan_pipeline()
    off = replace(SMALL, guidance=1.0)
    folder = make_latents(pipe, TWO, off, tmp_path / "l", count=2, seed=0, model="tiny")
    student = Student(tiny_wan_transformer(seed=1), replace(SLA, block=8), "projection")
    with pytest.raises(UsageError, match="ran with a scale of 1 or less.*--guided 0"):
        Distiller(student, folder, replace(HOW, guided=0.5), accelerator, tmp_path / "o")
    with pytest.raises(UsageError, match="no --guidance"):
        Distiller(student, folder, replace(HOW, guidance=3.0), accelerator, tmp_path / "o")
    assert Distiller(student, folder, HOW, accelerator, tmp_path / "o").guided == 0
    with pytest.raises(UsageError, match="has 1 branches where the folder's first has two"):
        Guidance(3.0, 0).pair(folder.read(0).conditions)


def test_samples_of_one_caption_do_not_tell_the_branches_apart(distil, tmp_path: Path) -> None:
    folder = make_latents(
        tiny_wan_pipeline(), Prompts(("a",)), SMALL, tmp_path / "l", count=2, seed=0, model="tiny"
    )
    with pytest.raises(UsageError, match="two of different captions are needed"):
        read_guidance(folder)
    assert distil(folder.folder, guided=0.0, batch=1).guidance is None


def test_experts_have_their_own_scale(tmp_path: Path) -> None:
    pipe, options = tiny_wan_pipeline(two_experts=True), replace(SMALL, guidance=4.0, guidance_2=3.0)
    folder = make_latents(pipe, TWO, options, tmp_path, count=2, seed=0, model="tiny")
    assert [read_guidance(folder, role).scale for role in ("transformer", "transformer_2")] == [4.0, 3.0]
    call = dict(width=32, height=32, num_frames=1, num_inference_steps=3, negative_prompt="")
    made = pipe(
        prompt=TWO.caption(0), guidance_scale=4.0, guidance_scale_2=3.0, **call, output_type="latent",
        generator=torch.Generator().manual_seed(0), return_dict=False,
    )[0]  # fmt: skip
    assert torch.equal(folder.read(0).latents, made)
    same = make_latents(pipe, TWO, replace(options, guidance_2=None), tmp_path / "b", count=2, seed=0, model="tiny")
    assert read_guidance(same, "transformer_2").scale == 4.0


@pytest.mark.parametrize(
    ("changed", "told"),
    (
        (dict(guided=-1.0), "guided = -1.0: a number from 0"),
        (dict(guidance=0.0), "guidance = 0.0: a positive number"),
        (dict(below=0.0), "below = 0.0: a noise level above 0"),
        (dict(below=1.5), "below = 1.5"),
        (dict(decay="linear"), "Unknown decay of the rates 'linear'"),
    ),
)
def test_options_that_cannot_be_are_refused(changed, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        replace(HOW, **changed)
