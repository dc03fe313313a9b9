"""Measured once, on a small real Wan: the same as running each thing for real."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dit_accel import accelerate
from dit_accel.errors import DitAccelError, UsageError
from dit_accel.options import SparseOptions
from dit_accel.pipelines import wan
from dit_accel.preset import load_preset
from dit_accel.testing import tiny_wan_pipeline
from dit_accel.tuning.follow import follow
from dit_accel.tuning.follow import forwards_of as forwards_followed
from dit_accel.tuning.gains import forwards_of, measure_gains, perturbed_steps
from dit_accel.tuning.interpose import idle, solver_weights, walk
from dit_accel.tuning.measure import branch_shares, close_steps, forwards, measure
from dit_accel.tuning.problem import Allocation, bucket_steps, make_problem
from dit_accel.tuning.tables import Gains

STEPS, LAYERS, KEEPS = 4, 2, (0.5, 0.25)
SPARSE = SparseOptions.from_mapping({"keep": 0.25, "block": 16, "order": "raster", "min_tokens": 0})


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_wan_pipeline(transformer={"num_layers": LAYERS})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def make(pipe) -> Callable:
    preset = load_preset("tiny-wan").with_values(
        {"generate.width": 64, "generate.height": 64, "generate.frames": 5, "generate.steps": STEPS}, "test"
    )
    return lambda: wan.generate(pipe, preset.generate, "star", seed=3)


@pytest.fixture(scope="module")
def measured(pipe, make):
    counted = []
    found = measure(pipe, SPARSE, KEEPS, STEPS, STEPS, make, lambda: counted.append(1))
    assert len(counted) == forwards(STEPS, 2, LAYERS, len(KEEPS), STEPS)
    return found


def really(pipe, make, **options) -> tuple[list[torch.Tensor], list[torch.Tensor], np.ndarray]:
    """Velocities of a real run, what went into layer 0's output projection, and the frames."""
    velocities, inputs = [], []

    def on_step(_: int, velocity: torch.Tensor) -> torch.Tensor:
        velocities.append(velocity.clone())
        return velocity

    projection = pipe.transformer.blocks[0].attn1.to_out[0]
    hook = projection.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    try:
        with walk(pipe.scheduler, on_step), accelerate(pipe, SPARSE, **options):
            frames = make()
    finally:
        hook.remove()
    return velocities, inputs, frames


def test_each_layer_alone_is_as_in_a_real_forward(pipe, make, measured) -> None:
    sample, vectors = measured
    dense, before, frames = really(pipe, make, dense_layers=(0, 1))
    assert np.array_equal(frames, vectors.frames)
    assert all(torch.equal(a, b) for a, b in zip(dense, vectors.velocities, strict=True))
    assert sample.steps == [0, 1, 2, 3]
    for layer in range(LAYERS):
        velocities, inputs, _ = really(pipe, make, keep=0.25, dense_layers=(1 - layer,))
        assert float((velocities[0] - dense[0]).norm() ** 2) == pytest.approx(sample.alone[0][layer], rel=1e-3)
        if layer == 0:
            errors = [float((inputs[i] - before[i]).norm() ** 2 / before[i].norm() ** 2) for i in (0, 1)]
            assert np.mean(errors) == pytest.approx(sample.attention[0][0][1], rel=1e-3)
    for i, keep in enumerate(KEEPS):
        velocities, _, _ = really(pipe, make, keep=keep)
        assert float((velocities[0] - dense[0]).norm() ** 2) == pytest.approx(sample.together[0][i], rel=1e-3)
        if i == sample.reference:
            gram = np.array(sample.gram)
            assert torch.allclose(velocities[0] - dense[0], vectors.errors[0], atol=1e-5)
            assert gram[STEPS, STEPS] == pytest.approx(sample.together[0][i], rel=1e-3)
    assert sample.noise == sorted(sample.noise, reverse=True) and sample.roles == ["transformer"] * STEPS


def test_solver_weights_are_exact(pipe, make, measured) -> None:
    sample, vectors = measured
    push = torch.randn(vectors.velocities[2].shape) * 0.1

    def on_step(step: int, velocity: torch.Tensor) -> torch.Tensor:
        return vectors.velocities[step] + (push if step == 2 else 0)

    with walk(pipe.scheduler, on_step) as noted:
        make()
    assert torch.allclose(noted.final - vectors.final, sample.weights[2] * push, atol=1e-5)
    assert solver_weights(noted.scheduler) == sample.weights
    assert "step" not in pipe.scheduler.__dict__


def test_gains_are_those_of_a_run_that_goes_wrong_at_one_step(pipe, make, measured) -> None:
    sample, vectors = measured
    counted = []
    gains = measure_gains(pipe, vectors, sample.weights, 2, make, lambda: counted.append(1))
    assert gains.steps == perturbed_steps(STEPS, 2) == [0, 1, 3]
    # behind step 0, which is never made up, and of both kinds behind step 1; both branches
    assert len(counted) == forwards_of(STEPS, 2, 2) == (3 + 2 * 2) * 2
    assert gains.reuse[2] == pytest.approx(1, rel=1e-3), "nothing comes behind the last step: the solver's own weight"
    assert gains.sparse[2] == pytest.approx(1, rel=1e-3)
    assert "forward" not in pipe.transformer.__dict__

    def moved(at: int, error: torch.Tensor) -> float:
        with walk(pipe.scheduler, lambda step, velocity: velocity + (error if step == at else 0)) as noted:
            make()
        return float((noted.final - vectors.final).norm()) / (abs(sample.weights[at]) * float(error.norm()))

    assert gains.reuse[1] == pytest.approx(moved(1, vectors.velocities[0] - vectors.velocities[1]), rel=1e-2)
    assert gains.sparse[0] == pytest.approx(moved(0, vectors.errors[0]), rel=1e-2)

    problem = make_problem([sample], gains, 2, 1.0)
    assert problem.loss(problem.dense()) == 0 and problem.cost(problem.dense()) == 1
    last = Allocation((True, True, True, False), ((0, 0),) * LAYERS)
    _, _, frames = really(pipe, make, dense_layers=(0, 1), cache={"name": "latent", "schedule": "1110", "min_steps": 0})
    assert frames.shape == vectors.frames.shape
    apart = float((vectors.velocities[2] - vectors.velocities[3]).norm() * abs(sample.weights[3])) ** 2
    assert problem.loss(last) == pytest.approx(apart / sample.elements, rel=1e-3)


def test_a_layer_followed_to_the_end_is_a_real_run(pipe, make, measured, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, vectors = measured
    bucket, keep, counted = bucket_steps(STEPS, 2), KEEPS[sample.reference], []
    assert bucket == [0, 0, 1, 1]
    between = float(np.mean(sample.noise[1:3]))

    def final(layer: int, **options) -> torch.Tensor:
        with walk(pipe.scheduler, lambda step, velocity: velocity) as noted:
            with accelerate(pipe, SPARSE, keep=keep, dense_layers=(1 - layer,), **options):
                make()
        return noted.final

    real = [[final(layer, dense_below=between), final(layer, dense_above=between)] for layer in range(LAYERS)]
    with monkeypatch.context() as patched:
        patched.setattr(type(pipe.vae), "decode", lambda *_, **__: pytest.fail("decoded"))
        found = follow(pipe, SPARSE, keep, bucket, LAYERS, vectors, make, lambda: counted.append(1))
    assert len(counted) == forwards_followed(bucket, LAYERS, 2) == LAYERS * (4 + 2) * 2
    for row, finals in zip(found, real, strict=True):
        moved = [float((one - vectors.final).square().sum()) for one in finals]
        assert row == pytest.approx(moved, rel=1e-3) and min(row) > 0
    assert not {"forward", "_dit_accel"} & set(pipe.transformer.__dict__) and "step" not in pipe.scheduler.__dict__
    _, _, frames = really(pipe, make, dense_layers=(0, 1))
    assert np.array_equal(frames, vectors.frames), "a run that was cut off leaves nothing behind"

    # what is predicted of one layer in one part is what was found; of both, their sum; velocities as before
    gains = measure_gains(pipe, vectors, sample.weights, 2, make, lambda: None)
    plain = make_problem([sample], gains, 2, 1.0)
    told = make_problem([dataclasses.replace(sample, followed=found)], gains, 2, 1.0)
    place = 1 + sample.reference
    every, first = (True,) * STEPS, Allocation((True,) * STEPS, ((place, 0), (0, 0)))
    assert told.loss(first) * sample.elements == pytest.approx(found[0][0], rel=1e-6)
    both = Allocation(every, ((place, 0), (0, place)))
    assert told.loss(both) * sample.elements == pytest.approx(found[0][0] + found[1][1], rel=1e-6)
    assert told.velocity_error(both) == plain.velocity_error(both)
    better = [[[row[1] / 4, row[1]] for row in layer] for layer in sample.attention]
    told = make_problem([dataclasses.replace(sample, followed=found, attention=better)], gains, 2, 1.0)
    reads_more = Allocation(every, ((1, 0), (0, 0)))  # better by as much as the layer's own attention is
    assert place == 2 and told.loss(reads_more) == pytest.approx(told.loss(first) / 4, rel=1e-6)
    without = Allocation((True, True, True, False), ((0, 0),) * LAYERS)
    assert told.loss(without) == pytest.approx(plain.loss(without), rel=1e-9)
    assert told.loss(told.dense()) == 0


def test_losses_are_averaged_as_psnr_is(measured) -> None:
    sample, _ = measured
    gains = Gains([0, 3], sparse=[2.0, 1.0], reuse=[3.0, 1.0], pixels=[])
    double = dataclasses.replace(sample, gram=(4 * np.array(sample.gram)).tolist())
    last = Allocation((True, True, False, True), ((0, 1),) * LAYERS)
    alone = [make_problem([one], gains, 2, 1.0).loss(last) for one in (sample, double)]
    assert alone[1] == pytest.approx(4 * alone[0])
    assert make_problem([sample, double], gains, 2, 1.0).loss(last) == pytest.approx(2 * alone[0])


def test_what_cannot_be_measured_is_said(pipe, make) -> None:
    with pytest.raises(UsageError, match="nothing can run sparse here.*fewer than.*min_tokens=0"):
        measure(pipe, dataclasses.replace(SPARSE, min_tokens=10**6), KEEPS, STEPS, 1, make, lambda: None)
    assert "step" not in pipe.scheduler.__dict__ and not pipe.transformer._forward_hooks
    with pytest.raises(DitAccelError, match="no sum of them"):
        branch_shares([torch.randn(1, 8), torch.randn(1, 8)], torch.randn(1, 8))
    cond, uncond = torch.randn(1, 8), torch.randn(1, 8)
    assert branch_shares([cond, uncond], 5 * cond - 4 * uncond) == pytest.approx([5, -4])
    assert branch_shares([torch.cat([uncond, cond])], 5 * cond - 4 * uncond) == pytest.approx([-4, 5])


def test_close_steps_lie_in_the_middle_of_their_parts() -> None:
    assert close_steps(20, 3) == {3, 10, 16}
    assert close_steps(4, 9) == {0, 1, 2, 3}


def test_idle_gives_forwards_back(pipe, make) -> None:
    with pytest.raises(RuntimeError, match="stop"), idle(pipe, lambda: False, torch.zeros(1), lambda: None):
        raise RuntimeError("stop")
    assert "forward" not in pipe.transformer.__dict__
