"""Self-distillation on a real tiny Wan: it learns, goes on exactly, and refuses what cannot be."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dit_accel.errors import DitAccelError, EnvironmentProblem, UsageError
from dit_accel.sla.weights import load_sla_weights
from dit_accel.testing import tiny_wan_transformer
from dit_accel.training.compare import compare_ways, ways_of_file
from dit_accel.training.distill import (
    Distiller,
    DistillOptions,
    make_accelerator,
)
from dit_accel.training.ema import Average
from dit_accel.training.samples import LatentFolder
from dit_accel.training.sla import SlaOptions
from dit_accel.training.student import TRAINS, Student, lora_targets

# 108 tokens in 7 blocks, the last of them ragged. In a random model attention is nearly even: the linear part, whose
# share the mix learns, is most of it.
SLA = SlaOptions(keep=0.1, block=16, order="raster", mix=True)
HOW = DistillOptions(
    steps=20, batch=2, rate=1e-4, projection_rate=5e-3, mix_rate=0.5, warmup=3, ema=0.5, held_out=1
)


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator("no", cpu=True)


@pytest.fixture
def distil(tiny_latents: Path, accelerator, tmp_path: Path, one_thread):
    """A `Distiller` of a fresh student, in a folder of the test's own."""

    def make(trains: str = "projection", name: str = "out", sla: SlaOptions = SLA, **changed) -> Distiller:
        student = Student(tiny_wan_transformer(seed=1), sla, trains, rank=2)
        how = replace(HOW, **changed)
        return Distiller(student, LatentFolder(tiny_latents), how, accelerator, tmp_path / name)

    return make


@pytest.mark.parametrize("trains", TRAINS)
def test_the_velocity_error_falls_and_the_side_file_gives_it(distil, trains: str) -> None:
    distiller = distil(trains)
    record = distiller.run({"told": 1})
    before, after = (record["velocity_error"][when] for when in ("before", "after"))
    assert after["overall"] < 0.5 * before["overall"]
    assert all(b["error"] > a["error"] for b, a in zip(before["levels"], after["levels"], strict=True))
    assert json.loads(distiller.out.record.read_text()) == json.loads(json.dumps(record))
    assert record["steps"] == len(record["losses"]) == HOW.steps and record["told"] == 1

    stock = tiny_wan_transformer(seed=1)
    kept = {name: p.clone() for name, p in stock.named_parameters()}
    places = distiller.held_out
    ways = ways_of_file(distiller.out.weights)
    found = compare_ways(stock, ways, distiller.folder, places, levels=5, seed=HOW.seed)
    assert found["sla, trained"].error.overall == pytest.approx(after["overall"], rel=1e-3)
    assert found["sla, trained"].error.overall < 0.5 * found["sla, untrained"].error.overall
    assert found["sla, trained"].error.overall < 0.5 * found["pooled"].error.overall
    shares = [each.report.keep_achieved for each in found.values()]
    assert max(shares) < 1.05 * min(shares)  # what is compared reads as much, but for the shorter last block
    assert all(torch.equal(p, kept[name]) for name, p in stock.named_parameters())
    weights = load_sla_weights(distiller.out.weights)
    assert bool(weights.tensors) == (trains == "full") and bool(weights.lora) == (trains == "lora")


@pytest.mark.parametrize("trains", TRAINS)
def test_the_teacher_is_the_dense_model_all_along(distil, trains: str) -> None:
    distiller, stock = distil(trains, steps=2), tiny_wan_transformer(seed=1)
    inputs = distiller.draws.draw(0, 0, 0, 1).inputs(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        aim = stock(**inputs)[0]
    assert torch.equal(distiller.student.teacher(**inputs), aim)
    untrained = distiller.student(**inputs)
    distiller.run({})
    assert torch.equal(distiller.student.teacher(**inputs), aim)
    assert not torch.equal(distiller.student(**inputs), untrained)


@pytest.mark.parametrize("trains", ("lora", "full"))
def test_going_on_equals_never_having_stopped(distil, trains: str) -> None:
    """Guidance, accumulation and falling rates included: all of them are functions of the step."""
    how = dict(steps=4, batch=1, accumulate=2, warmup=1)
    whole, first = distil(trains, "whole", **how), distil(trains, "parts", **how)
    whole.run({})

    def interrupt(step: int, loss: float) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    assert first.run({}, interrupt)["interrupted"]
    second = distil(trains, "parts", **how)
    assert second.guided == 4 and second.options.decay == "cosine"
    second.resume()
    assert second.step == 2
    second.run({})
    assert second.losses == whole.losses and second.before == whole.before
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name
        assert torch.equal(whole.average.values[name], second.average.values[name]), name
    ours, theirs = (load_file(d.out.weights) for d in (whole, second))
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_a_checkpoint_of_other_options_or_damaged_is_refused(distil, tmp_path: Path) -> None:
    distil(steps=1).run({})
    for changed, told in ((dict(rate=1e-3), "rate = 0.0001, and 0.001"), (dict(seed=5), "seed = 0, and 5")):
        with pytest.raises(UsageError, match=told):
            distil(steps=2, **changed).resume()
    with pytest.raises(UsageError, match="trains = 'projection', and 'lora'"):
        distil("lora", steps=2).resume()
    with pytest.raises(UsageError, match="sla ="):
        distil(steps=2, sla=replace(SLA, keep=0.3)).resume()
    with pytest.raises(EnvironmentProblem, match="cannot read the checkpoint"):
        distil(name="none").resume()
    path = tmp_path / "out" / "checkpoint-transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(EnvironmentProblem, match="cannot read the checkpoint"):
        distil(steps=2).resume()
    (path.parent / "transformer.safetensors").rename(path)
    with pytest.raises(EnvironmentProblem, match="no checkpoint of a fine-tuning"):
        distil(steps=2).resume()


def test_a_checkpoint_that_does_not_know_an_option_is_refused(distil) -> None:
    distiller = distil(steps=1)
    distiller.run({})
    path = distiller.out.checkpoint
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    told = json.loads(metadata["told"])
    del told["options"]["guided"]
    save_file(load_file(path), path, {**metadata, "told": json.dumps(told)})
    with pytest.raises(UsageError, match="guided = None, and 4.0 is asked for"):
        distil(steps=2).resume()


def test_accumulating_is_a_larger_batch(distil) -> None:
    large, small = distil(name="a", steps=1, batch=4), distil(name="b", steps=1, batch=2, accumulate=2)
    large.run({})
    small.run({})
    torch.testing.assert_close(large.losses, small.losses, rtol=1e-4, atol=0)
    for name, parameter in large.parameters.items():
        torch.testing.assert_close(parameter, small.parameters[name], rtol=1e-3, atol=1e-4)


def test_checkpointed_activations_change_nothing(distil) -> None:
    plain, thrifty = distil("lora", "a", steps=1), distil("lora", "b", steps=1, checkpointing=True)
    plain.run({})
    thrifty.run({})
    assert plain.losses == thrifty.losses
    assert all(torch.equal(p, thrifty.parameters[name]) for name, p in plain.parameters.items())


def test_an_interrupt_leaves_a_checkpoint_to_go_on_from(distil) -> None:
    whole, cut = distil(name="whole", steps=4), distil(name="cut", steps=4)
    whole.run({})

    def interrupt(step: int, loss: float) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert cut.run({}, interrupt)["interrupted"] and signal.getsignal(signal.SIGINT) is before
    assert cut.step == 3 and not cut.out.weights.exists()  # the step under way was finished
    again = distil(name="cut", steps=4)
    again.resume()
    assert not again.run({})["interrupted"] and again.losses == whole.losses


def test_the_minutes_end_a_run(distil) -> None:
    distiller = distil(steps=None, minutes=1e-9)
    record = distiller.run({})
    assert record["steps"] == 0 and record["velocity_error"]["before"] == record["velocity_error"]["after"]


def test_the_rates_rise_and_fall_to_nothing(distil) -> None:
    rates: dict[str, list[float]] = {}
    for decay in ("cosine", "none"):
        distiller = distil(name=decay, steps=8, warmup=2, decay=decay, batch=1)
        group, rates[decay] = distiller.optimiser.param_groups[0], []

        def note(step: int, loss: float, group=group, rates=rates[decay]) -> None:
            rates.append(group["lr"] / group["top"])

        distiller.run({}, note)
    assert rates["none"] == [0.5, *[1.0] * 7]
    expected = [risen * math.cos(math.pi * step / 16) ** 2 for step, risen in enumerate(rates["none"])]
    assert rates["cosine"] == pytest.approx(expected)
    how = replace(HOW, steps=None, minutes=2.0, warmup=0)
    assert [how.share_of_rate(9, how.progress(9, seconds)) for seconds in (0, 60, 120)] == pytest.approx([1, 0.5, 0])
    assert replace(how, steps=10).progress(9, 60.0) == 0.9  # what comes first ends the run


def test_noise_levels_stop_where_a_preset_becomes_dense(distil) -> None:
    for noise in ("schedule", "lognormal"):
        distiller = distil(batch=32, below=0.8, noise=noise, guided=0.0)
        levels = distiller.draws.draw(0, 0, 0, 1).timestep
        assert levels.max() <= 800 and levels.unique().numel() > 2
    schedule = distiller.folder.index.schedule
    own = [sigma for sigma, t in zip(schedule.sigmas, schedule.timesteps, strict=True) if t <= 800]
    assert 0 < len(own) < len(schedule.sigmas)
    assert [sigma for sigma, _ in distiller.measure().levels] == own
    stock, ways = tiny_wan_transformer(seed=1), {"pooled": {"method": "pooled", "keep": 0.3}}
    found = compare_ways(stock, ways, distiller.folder, (0,), levels=9, seed=0, below=0.8)
    assert [sigma for sigma, _ in found["pooled"].error.levels] == own
    least = schedule.timesteps[-1] / schedule.scale
    with pytest.raises(UsageError, match=f"below = 0.01 leaves none of the 6 .* end at {least:.3f}"):
        distil(below=0.01)


def test_a_loss_that_is_not_finite_ends_the_run(distil) -> None:
    distiller = distil(steps=3)
    with torch.no_grad():
        next(iter(distiller.parameters.values())).fill_(float("nan"))
    with pytest.raises(DitAccelError, match="loss of step 1 is nan"):
        distiller.run({})


def test_the_average_follows_and_gives_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average, plain = (Average({"p": parameter}, decay) for decay in (0.9, 0.0))
    with torch.no_grad():
        parameter.fill_(1.0)
    for steps in (1, 2):
        average.update(steps)
        plain.update(steps)
    early, late = 1 / 11, 2 / 12  # steps / (steps + 10)
    torch.testing.assert_close(average.values["p"], torch.full((3,), 1 - early * late))
    with plain.applied(), average.applied():
        assert parameter.max() < 1
    assert torch.equal(parameter, torch.ones(3)) and torch.equal(plain.values["p"], torch.ones(3))
    with pytest.raises(UsageError, match="ema = 1"):
        Average({}, 1.0)


def test_what_trains_and_at_which_rate(distil) -> None:
    counts = {trains: len(distil(trains).parameters) for trains in TRAINS}
    assert counts["projection"] == 2 * 3 and counts["lora"] == counts["projection"] + 2 * 2 * 4
    groups = distil("full").optimiser.param_groups
    assert [group["top"] for group in groups] == [HOW.mix_rate, HOW.projection_rate, HOW.rate]
    assert [len(group["params"]) for group in groups][:2] == [2, 4]
    targets = lora_targets(tiny_wan_transformer(), dense_layers=(-1,))
    assert targets == [f"blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]


@pytest.mark.parametrize(
    ("changed", "told"),
    (
        (dict(steps=None), "how long to train"),
        (dict(steps=0), "steps = 0: at least 1"),
        (dict(batch=0), "batch = 0"),
        (dict(rate=0.0), "rate = 0"),
        (dict(clip=-1.0), "clip = -1"),
        (dict(warmup=-1), "warmup = -1"),
        (dict(noise="even"), "Unknown distribution of noise levels 'even'"),
        (dict(precision="fp16"), "Unknown precision 'fp16'"),
    ),
)
def test_options_that_cannot_be_are_refused(changed, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        replace(HOW, **changed)


def test_students_and_latents_that_do_not_fit_are_refused(distil, tiny_latents: Path, accelerator) -> None:
    with pytest.raises(UsageError, match="Unknown choice of what trains 'all'"):
        distil("all")
    with pytest.raises(UsageError, match="LoRA of rank 0"):
        Student(tiny_wan_transformer(), SLA, "lora", 0)
    with pytest.raises(DitAccelError, match="holds 6 samples, and training with 6 held out needs 7"):
        distil(held_out=6)
    vace = Student(tiny_wan_transformer(vace_layers=[0], vace_in_channels=16), SLA, "projection")
    with pytest.raises(UsageError, match="latents of a WanTransformer3DModel, and the student is a WanVACE"):
        Distiller(vace, LatentFolder(tiny_latents), HOW, accelerator, tiny_latents)


def test_missing_packages_are_named_with_their_cure() -> None:
    code = """
import sys
from dit_accel.errors import EnvironmentProblem
from dit_accel.testing import tiny_wan_transformer
from dit_accel.training.distill import make_accelerator
from dit_accel.training.sla import SlaOptions
from dit_accel.training.student import Student
transformer = tiny_wan_transformer()
sys.modules["accelerate"] = sys.modules["peft"] = None  # importing them raises ImportError now
for start in (lambda: make_accelerator("no"), lambda: Student(transformer, SlaOptions(), "lora")):
    try:
        start()
    except EnvironmentProblem as problem:
        print(problem)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "fine-tuning needs accelerate: pip install 'dit-accel[training]'"
    assert second.startswith("a LoRA needs peft: pip install 'dit-accel[training]'")
