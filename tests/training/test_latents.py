"""Training data: what the pipeline tells its transformer is kept, resumed and read back; bad data is refused."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel.errors import DitAccelError, EnvironmentProblem, UsageError
from dit_accel.preset import GenerateOptions
from dit_accel.testing import (
    tiny_flux_with_text,
    tiny_hunyuan_video_with_text,
    tiny_sd3_with_text,
    tiny_wan_pipeline,
)
from dit_accel.training.capture import run_captured
from dit_accel.training.draws import Batch, Draws, spread_levels
from dit_accel.training.latents import encode_clip, make_latents
from dit_accel.training.samples import Index, LatentFolder, Sample, join_rows
from dit_accel.training.sources import HELD_OUT_FROM, Prompts, Scenes, Videos, fit_frames

SMALL = GenerateOptions(width=32, height=32, frames=9, steps=3, guidance=5.0)


@pytest.fixture
def one_pipe():
    return tiny_wan_pipeline()


@pytest.mark.parametrize(
    "make", (tiny_wan_pipeline, tiny_flux_with_text, tiny_sd3_with_text, tiny_hunyuan_video_with_text)
)
def test_a_captured_forward_is_the_pipelines_own(make, one_thread) -> None:
    """Calling the transformer with what was kept gives what the pipeline got at each of its branches."""
    pipe, seen = make(), []
    transformer = pipe.transformer
    names = [name for name in inspect.signature(inspect.unwrap(type(transformer).forward)).parameters if name != "self"]

    def listen(module, args, kwargs, output):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        seen.append((given["hidden_states"], given["timestep"], output[0]))

    hook = transformer.register_forward_hook(listen, with_kwargs=True)
    run = run_captured(pipe, SMALL, "a red ball", seed=3)
    hook.remove()
    first = [entry for entry in seen if entry[1].max() == seen[0][1].max()]
    aim = torch.cat([velocity for _, _, velocity in first])
    assert len(run.conditions) == len(aim)  # a condition for each branch of guidance
    start = first[0][0][:1]
    sigma, timestep = torch.tensor([run.schedule.sigmas[0]]), torch.tensor([run.schedule.timesteps[0]])
    for condition, expected in zip(run.conditions, aim, strict=True):
        batch = Batch(torch.zeros_like(start), start / sigma, sigma, timestep, dict(condition))
        with torch.no_grad():
            given = transformer(**batch.inputs(start.device, start.dtype))[0]
        torch.testing.assert_close(given[0], expected, rtol=1e-4, atol=1e-5)
    assert len(run.schedule.sigmas) == SMALL.steps and run.latents.shape == start.shape


def test_the_schedule_is_the_whole_one_when_a_run_stops_early(one_pipe) -> None:
    whole, early = (run_captured(one_pipe, SMALL, "x", seed=0, steps=steps) for steps in (None, 1))
    assert whole.schedule == early.schedule and len(whole.schedule.sigmas) == SMALL.steps
    assert not torch.equal(whole.latents, early.latents)


def test_denoised_latents_are_what_the_pipeline_makes(one_pipe) -> None:
    run = run_captured(one_pipe, SMALL, "a cat", seed=1)
    call = dict(width=32, height=32, num_frames=9, num_inference_steps=3, guidance_scale=5.0, negative_prompt="")
    generator = torch.Generator().manual_seed(1)
    (made,) = one_pipe(prompt="a cat", **call, generator=generator, output_type="latent", return_dict=False)
    assert torch.equal(run.latents, made)


def test_a_folder_that_was_interrupted_is_gone_on_with(one_pipe, tmp_path: Path) -> None:
    source, whole, parts = Prompts(("a dog", "a cat")), tmp_path / "whole", tmp_path / "parts"
    common = dict(seed=5, model="tiny")
    make_latents(one_pipe, source, SMALL, whole, count=3, **common)
    make_latents(one_pipe, source, SMALL, parts, count=1, **common)
    made: list[int] = []
    again = make_latents(one_pipe, source, SMALL, parts, count=3, **common, after=made.append)
    assert made == [1, 2]
    for place in range(3):
        one, other = LatentFolder(whole).read(place), again.read(place)
        assert one.caption == other.caption == ("a dog", "a cat", "a dog")[place]
        assert torch.equal(one.latents, other.latents)
        assert all(torch.equal(a["encoder_hidden_states"], b["encoder_hidden_states"])
                   for a, b in zip(one.conditions, other.conditions, strict=True))  # fmt: skip
    with pytest.raises(UsageError, match="seed = 5, and 6 is asked"):
        make_latents(one_pipe, source, SMALL, parts, count=4, seed=6, model="tiny")


def test_processes_share_the_work(one_pipe, tmp_path: Path) -> None:
    for rank in (1, 0):
        made: list[int] = []
        shared = dict(count=3, seed=0, model="tiny", share=(rank, 2), after=made.append)
        make_latents(one_pipe, Prompts(("a",)), replace(SMALL, steps=1), tmp_path, **shared)
        assert made == ([1], [0, 2])[1 - rank]


@pytest.mark.parametrize("make", (tiny_wan_pipeline, tiny_hunyuan_video_with_text))
def test_encoded_clips_are_decoded_by_the_pipeline(make) -> None:
    """Latents of a clip are what the pipeline's own decoding undoes."""
    pipe = make()
    clip = Scenes(0).frames(0, SMALL)
    latents = encode_clip(pipe, clip)

    def after(pipeline, step, timestep, kwargs):
        return {"latents": latents}

    call = dict(width=32, height=32, num_frames=9, num_inference_steps=1, output_type="pt")
    shown = pipe(prompt="x", callback_on_step_end=after, **call, return_dict=False)[0]
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode(), return_dict=False)[0]
    expected = (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01


def test_clips_of_other_pipelines_are_refused() -> None:
    with pytest.raises(UsageError, match="not for FluxPipeline; give prompts"):
        encode_clip(tiny_flux_with_text(), torch.zeros(1, 3, 1, 8, 8))


def test_scenes_are_the_same_every_time_and_held_out_from_a_number_on(one_pipe) -> None:
    a, b = Scenes(seed=1), Scenes(seed=1)
    assert a.caption(4) == b.caption(4) != a.caption(5)
    assert torch.equal(a.frames(4, SMALL), b.frames(4, SMALL))
    assert Scenes(1, first=HELD_OUT_FROM).caption(0) == Scenes(1).caption(HELD_OUT_FROM)
    assert Scenes(1, rendered=False).frames(0, SMALL) is None


def write_video(path: Path, frames: int = 9, size: int = 48, caption: str | None = "a grey field") -> None:
    from dit_accel.pipelines.video import write_clip

    rng = np.random.default_rng(0)
    write_clip(path, rng.integers(0, 255, (frames, size, size, 3), dtype=np.uint8), 8.0)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def test_a_folder_of_videos_becomes_latents(one_pipe, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "a.mp4")
    write_video(tmp_path / "v" / "b.gif", caption="snow on a screen\n")
    folder = make_latents(one_pipe, Videos(tmp_path / "v"), SMALL, tmp_path / "l", count=2, seed=0, model="tiny")
    samples = [folder.read(place) for place in range(2)]
    assert [s.caption for s in samples] == ["a grey field", "snow on a screen"]
    assert all(len(s.conditions) == 2 and s.latents.shape == folder.index.shape for s in samples)
    with pytest.raises(UsageError, match="holds 2 videos, and number 3 is asked for; lower --count"):
        make_latents(one_pipe, Videos(tmp_path / "v"), SMALL, tmp_path / "l", count=3, seed=0, model="tiny")


def test_bad_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder of videos"):
        Videos(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no videos in"):
        Videos(tmp_path)
    write_video(tmp_path / "a.mp4", caption=None)
    with pytest.raises(UsageError, match=r"no caption for a.mp4 .* \.txt"):
        Videos(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UsageError, match="a.txt is empty"):
        Videos(tmp_path)
    (tmp_path / "a.txt").write_text("something")
    with pytest.raises(UsageError, match="has 9 frames and 33 are needed"):
        Videos(tmp_path).frames(0, replace(SMALL, frames=33))
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    with pytest.raises(EnvironmentProblem, match="cannot read"):
        Videos(tmp_path).frames(0, SMALL)


def test_frames_are_scaled_to_cover_and_cut_in_the_middle() -> None:
    clip = np.zeros((2, 40, 80, 3), np.uint8)
    clip[:, :, 38:42] = 255  # the middle columns
    frames = fit_frames(clip, 20, 20)
    assert frames.shape == (1, 3, 2, 20, 20)
    assert frames[..., 9:11].min() > 0.5 and frames[..., :6].max() == -1


def test_bad_folders_are_refused(tiny_latents: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no latents in"):
        LatentFolder(tmp_path)
    folder = LatentFolder(tiny_latents)
    sample, index = folder.read(0), folder.index
    other = LatentFolder(tmp_path / "other", index)
    with pytest.raises(UsageError, match="sample 0 has latents of shape"):
        other.write(0, replace(sample, latents=sample.latents[..., 1:]))
    with pytest.raises(UsageError, match="fn of type function, which cannot be kept"):
        other.write(0, Sample("", sample.latents, ({"fn": test_bad_folders_are_refused},)))
    other.write(0, sample)
    other.path(0).write_bytes(other.path(0).read_bytes()[:-9])
    with pytest.raises(EnvironmentProblem, match="make the latents again"):
        other.read(0)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(EnvironmentProblem, match="no index of latents"):
        Index.read(tmp_path)


def test_rows_that_do_not_fit_are_refused() -> None:
    latents = torch.zeros(1, 2)
    shared = {"ids": torch.zeros(4, 3), "n": 2}
    rows = [(latents, {"e": torch.zeros(1, length, 3), **shared}) for length in (4, 5)]
    with pytest.raises(UsageError, match=r"e has the shapes \(1, 4, 3\) and \(1, 5, 3\) .* --batch 1"):
        join_rows(rows)
    with pytest.raises(UsageError, match="n differs between the rows"):
        join_rows([rows[0], (latents, {**rows[0][1], "n": 3})])
    joined, arguments = join_rows([rows[0], rows[0]])
    assert joined.shape == (2, 2) and arguments["e"].shape == (2, 4, 3) and arguments["ids"].shape == (4, 3)


def test_draws_are_functions_of_their_place(tiny_latents: Path) -> None:
    folder = LatentFolder(tiny_latents)

    def draws(**changed):
        return Draws(folder, range(5), **dict(batch=2, accumulate=2, noise="schedule", seed=1) | changed)

    late = draws().draw(3, 1, 0, 1)
    again = draws()
    for step in range(3):
        again.draw(step, 0, 0, 1)
    for one, other in ((late, again.draw(3, 1, 0, 1)), (late, draws(accumulate=1).draw(7, 0, 0, 1))):
        assert torch.equal(one.latents, other.latents) and torch.equal(one.noise, other.noise)
        assert torch.equal(one.sigma, other.sigma)
    assert not torch.equal(late.noise, draws(seed=2).draw(3, 1, 0, 1).noise)
    # two processes of one row see what one of two rows does
    halves = [draws(batch=1).draw(3, 1, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([half.noise for half in halves]), late.noise)


def test_every_sample_and_branch_is_drawn_and_noise_is_where_it_is_asked_for(tiny_latents: Path) -> None:
    folder = LatentFolder(tiny_latents)
    draws = Draws(folder, range(4), batch=4, accumulate=1, noise="schedule", seed=0)
    known = {folder.read(place).latents.sum().item() for place in range(4)}
    batch = draws.draw(0, 0, 0, 1)
    assert {row.sum().item() for row in batch.latents} == known  # an epoch holds each once
    schedule = dict(zip(folder.index.schedule.timesteps, folder.index.schedule.sigmas, strict=True))
    for sigma, timestep in zip(batch.sigma.tolist(), batch.timestep.tolist(), strict=True):
        assert sigma == pytest.approx(schedule[timestep])
    noisy = batch.noisy[0] - batch.sigma[0] * batch.noise[0]
    torch.testing.assert_close(noisy, (1 - batch.sigma[0]) * batch.latents[0])
    free = Draws(folder, range(4), batch=64, accumulate=1, noise="lognormal", seed=0).draw(0, 0, 0, 1)
    assert free.sigma.median().item() == pytest.approx(torch.sigmoid(torch.tensor(1.5)).item(), abs=0.1)
    torch.testing.assert_close(free.timestep, free.sigma * 1000)
    captions = {row.sum().item() for row in free.arguments["encoder_hidden_states"]}
    assert len(captions) == 4 + 1  # each caption, and the empty one
    with pytest.raises(UsageError, match="Unknown distribution of noise levels"):
        Draws(folder, range(4), batch=1, accumulate=1, noise="uniform", seed=0)


def test_levels_are_spread_over_the_schedule(tiny_latents: Path) -> None:
    schedule = LatentFolder(tiny_latents).index.schedule
    levels = spread_levels(schedule, 3)
    assert [s for s, _ in levels][:: len(levels) - 1] == [schedule.sigmas[0], schedule.sigmas[-1]]
    assert len(spread_levels(schedule, 99)) == len(schedule.sigmas)


def test_models_of_two_experts_and_of_pictures_are_refused() -> None:
    with pytest.raises(DitAccelError, match="at least 1 sample"):
        make_latents(tiny_wan_pipeline(), Prompts(), SMALL, Path("unused"), count=0, seed=0, model="tiny")
