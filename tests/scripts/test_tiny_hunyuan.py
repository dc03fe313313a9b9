"""The training of tiny-hunyuan: what is trained is what the stock pipeline runs, it learns, and it ships."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_accel.quality.scenes import sample_scene, write_caption

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CAPTION = "a red star moving left over a striped background"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def scripts_on_the_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tokenizers(scripts_on_the_path):
    from tiny_hunyuan.text import make_tokenizers

    return make_tokenizers()


@pytest.fixture(scope="module")
def vae(scripts_on_the_path):
    """An autoencoder with every weight moved."""
    from tiny_hunyuan.models import make_vae

    torch.manual_seed(0)
    vae = make_vae().eval().requires_grad_(False)
    for weight in vae.parameters():
        weight += 0.03 * torch.randn_like(weight)
    return vae


@pytest.fixture(scope="module")
def pool(vae, tokenizers):
    from tiny_hunyuan.dit import make_coder
    from tiny_hunyuan.text import CaptionTokenizer
    from tiny_models.clips import Mix, fill_pool

    mix = Mix.parse("32x9:4:1:8")
    return fill_pool(make_coder(vae), CaptionTokenizer(tokenizers[0]), random.Random(5), mix, "cpu")


@pytest.fixture(scope="module")
def make_student(tokenizers):
    """Makes students, each with the same weights, moved so that fresh gates do not hide what attention does."""
    from tiny_hunyuan.dit import make_student
    from tiny_hunyuan.text import CaptionTokenizer

    tokenizer = CaptionTokenizer(tokenizers[0])

    def make(teacher=None):
        torch.manual_seed(1)
        student = make_student(tokenizer, None, teacher)
        with torch.no_grad():
            for weight in (weight for block in student.blocks for weight in block.parameters()):
                weight += 0.03 * torch.randn_like(weight)
        return student

    return make


@torch.no_grad()
def test_a_student_is_called_as_the_pipeline_calls_it(vae, tokenizers, make_student):
    """One Euler step of the stock pipeline is the student's velocity at pure noise, padded texts and all."""
    from tiny_hunyuan.text import CaptionTokenizer

    student = make_student().eval()
    pipe = student.make_pipeline(vae, *tokenizers)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 8, 3, 8, 12)
    captions = [
        CAPTION,
        "a small blue circle spinning and a green ring growing over a panning cloudy background",
    ]
    told = CaptionTokenizer(tokenizers[0])(
        captions, padding="max_length", max_length=48, truncation=True, return_tensors="pt"
    )
    lengths = told.attention_mask.sum(1)
    assert lengths[0] != lengths[1] and lengths.max() < 48

    def step(guidance):
        return pipe(
            captions, height=32, width=48, num_frames=9, num_inference_steps=1, latents=latents.clone(),
            guidance_scale=guidance, output_type="latent", return_dict=False,
        )[0]  # fmt: skip

    one = torch.ones(2)
    for guidance in (1.0, 4.0):
        ours = student.denoise(latents, one, told.input_ids, told.attention_mask, guidance * one)
        torch.testing.assert_close(step(guidance), latents - ours, atol=1e-4, rtol=1e-4)
    other = student.denoise(latents, one, told.input_ids.flip(0), told.attention_mask.flip(0), one)
    assert not torch.allclose(step(1.0), latents - other, atol=1e-3), "the words matter"
    assert not torch.allclose(step(1.0), step(4.0), atol=1e-3), "the guidance that is told matters"
    stock = step(4.0)
    student.hurry()
    torch.testing.assert_close(step(4.0), stock, atol=1e-4, rtol=1e-4)


def test_the_template_is_what_the_pipeline_cuts_away(tokenizers):
    """Whatever the prompt, its words begin right behind the cut; where there is none, the end does."""
    from tiny_hunyuan.text import CROP, CaptionTokenizer
    from tiny_models.captions import tokenise

    llama, clip = tokenizers
    cut = CaptionTokenizer(llama)
    rng = random.Random(6)
    scenes = [sample_scene(rng, n_objects=1 + index % 2) for index in range(24)]
    captions = [write_caption(scene, rng) for scene in scenes]
    for caption in ("", " ", "5 o'clock\n\n", *captions):
        ids = cut([caption], max_length=48, padding="max_length", return_tensors="pt")
        assert llama.decode(ids.input_ids[0], skip_special_tokens=True).strip() == caption.strip()
        count = int(ids.attention_mask.sum())
        assert ids.input_ids[0, :count].tolist() == clip(caption).input_ids, "CLIP reads the same"
    for caption in captions:
        assert len(clip(caption).input_ids) == len(re.findall(r"\w+|,", caption)) + 1, "a word is a token"
    assert cut.before.shape == (1, CROP)

    ids, mask, labels = tokenise(cut, captions, scenes)
    for row, scene in enumerate(scenes):
        assert ((labels.owner[row] == -100) == (mask[row] == 0)).all()
        for place, thing in enumerate(scene.objects, start=1):
            spoken = llama.decode(ids[row][labels.owner[row] == place])
            assert thing.colour in spoken and thing.shape in spoken and scene.background.kind not in spoken


@torch.no_grad()
def test_what_a_teacher_adds_is_guidance(pool, make_student):
    """The aim is the data's velocity and (guidance - 1) x (with caption - without), and none for a dropped caption."""
    teacher = make_student().eval()
    student = make_student(teacher)
    drawn = pool.draw(4)
    empty = [x.expand(4, -1) for x in student.empty]
    dropped = torch.tensor([[False], [True], [False], [False]])
    drawn = replace(
        drawn,
        ids=torch.where(dropped, empty[0], pool.ids[:4]),
        mask=torch.where(dropped, empty[1], pool.mask[:4]),
    )
    sigma, velocity = torch.tensor([0.9, 0.8, 0.5, 0.2]), torch.randn_like(drawn.latents)
    student(drawn.latents, sigma, drawn)
    assert (student.guidance >= 1).all() and (student.guidance <= 6).all() and student.guidance.std() > 0
    one = torch.ones(4)
    given = teacher.denoise(drawn.latents, sigma, drawn.ids, drawn.mask, one)
    without = teacher.denoise(drawn.latents, sigma, *empty, one)
    got = student.aim(velocity, drawn.latents, sigma, drawn)
    added = (student.guidance - 1).view(-1, 1, 1, 1, 1) * (given - without)
    assert added[0].abs().max() > 1e-3
    torch.testing.assert_close(got, velocity + added, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1], velocity[1], atol=1e-5, rtol=0)
    assert len(list(student.parameters())) == len(list(teacher.parameters())), "the teacher is not trained"

    plain = make_student()
    plain(drawn.latents, sigma, drawn)
    assert (plain.guidance == 1).all() and plain.aim(velocity, drawn.latents, sigma, drawn) is velocity


@pytest.mark.parametrize("taught", [False, True])
def test_it_learns_what_it_is_shown(pool, make_student, taught):
    from tiny_models.learner import Heads, Learner
    from tiny_models.ranks import Ranks

    student = make_student(make_student().requires_grad_(False) if taught else None)
    student.hurry()
    student.tap(student.tapped)
    learner = Learner(student, Heads.make(student, None, None), 3e-3, 0.1, 5.0, Ranks(1, 0, "cpu"))
    drawn = pool.draw(8)
    learner.set_pace(0.0, 200)
    losses = torch.stack([learner.take_step(drawn) for _ in range(12)])
    assert student.hidden.shape == (8, 48, 128), "3 x 4 x 4 tokens of video"
    first, last = losses[:3].mean(0), losses[-3:].mean(0)
    assert (last < 0.9 * first).all(), (first, last)


@torch.no_grad()
def test_tiles_are_coded_as_the_stock_autoencoder_does(vae):
    """Both kinds of tile: from the clip's start, and the second that the stock one cuts, which begins at a latent of
    four frames."""
    import copy

    from tiny_hunyuan.vae import Tiles

    sure = copy.deepcopy(vae)
    sure.quant_conv.weight[8:], sure.quant_conv.bias[8:] = 0, -30  # latents are drawn from no width at all
    tiles = Tiles(None, None, 1, random.Random(0))
    clip = torch.rand(1, 3, 29, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = sure.encode(clip[:, :, :17]).latent_dist.mode()
    first, _ = tiles.code(sure, clip[:, :, :17])
    torch.testing.assert_close(first[:, :, :13], sure.decode(latents).sample[:, :, :13], atol=1e-4, rtol=1e-4)

    tiles.inside = True
    inside, posterior = tiles.code(sure, clip[:, :, 8:29])
    assert inside.shape[2] == 16 and posterior.mean.shape[2] == 6, "frames 13 to 28 and a latent before"
    tile = sure.decoder(sure.post_quant_conv(posterior.mean[:, :, 1:]))[:, :, 1:]
    torch.testing.assert_close(inside, tile, atol=1e-4, rtol=1e-4)


def test_the_autoencoder_learns_a_clip(vae):
    """The loop over tiles of one clip: what comes back is nearer to it, and no weight is left as it was."""
    import copy
    import time

    from tiny_hunyuan.vae import Tiles
    from tiny_models.autoencoder import CodePace, fit
    from tiny_models.clip_pool import ClipPool

    torch.manual_seed(0)
    clips = ClipPool(random.Random(0), 1, 21, 32, "cpu")
    tiles = Tiles(clips, clips, 2, random.Random(0))
    before = copy.deepcopy(vae).requires_grad_(True)
    after, record = fit(
        copy.deepcopy(before), tiles.draw, CodePace(0.1, 1e-3, 0, "cpu"), time.time(), tiles.code
    )
    clip = clips.draw_clips(1, 17)[0]

    def miss(model):
        return float((model.decode(model.encode(clip).latent_dist.mode()).sample - clip).square().mean())

    with torch.no_grad():
        assert record["steps"] > 5 and miss(after) < 0.8 * miss(before)
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_every_kind_of_tile_is_drawn():
    from tiny_hunyuan.vae import Tiles

    tiles = Tiles(Drawing("small"), Drawing("large"), 12, random.Random(1))
    drawn = [{tiles.draw(step) for step in range(start, 400, 2)} for start in (0, 1)]
    assert drawn[0] == {("small", 12, 5), ("small", 12, 13), ("small", 12, 17), ("large", 3, 17)}
    assert drawn[1] == {("small", 12, 9), ("small", 12, 17), ("small", 12, 21), ("large", 3, 21)}


class Drawing:
    """Tells what was asked of a pool of clips."""

    def __init__(self, name):
        self.name = name

    def draw_clips(self, count, frames):
        return self.name, count, frames


def test_every_stage_runs_and_the_folder_makes_a_clip(tmp_path, capsys, make_student):
    """From nothing to a clip, by the commands as they are written down: seconds on a CPU."""
    from train_tiny import main

    import dit_accel
    from dit_accel.pipelines import hunyuan_video
    from dit_accel.preset import load_preset

    def go(*words):
        main([str(word) for word in words])

    brief = ("--device", "cpu", "--minutes")
    text, vae, plain, guided = (tmp_path / name for name in ("text", "vae", "plain", "guided"))
    go("video-text", "--out", text, "--minutes", 0.06, "--batch", 16)
    history = json.loads((text / "text.json").read_text())["history"]
    assert history[-1]["step"] > 5 and history[-1]["read"] < 12, "15 is a guess"
    go("video-vae", "--out", vae, *brief, 0.03, "--batch", 2, "--clips", 1, "--size", 32, "--frames", 41)
    record = json.loads((vae / "vae.json").read_text())
    assert record["history"] and record["reconstruction_32"]["clips"] == 1

    small = (
        "--vae-from",
        vae,
        "--mix",
        "32x9:2:0.5:2",
        "--mix",
        "32x5:2:0.5:2",
        "--no-compiled",
        *brief,
        0.01,
    )
    go("hunyuan-dit", "--out", plain, "--text-from", text, *small)
    go("hunyuan-dit", "--out", guided, "--resume", plain, "--guide-from", plain, *small)
    first, second = (json.loads((folder / "dit.json").read_text()) for folder in (plain, guided))
    assert first["steps"] > 0 and not first["resumed"] and first["guidance"] == 1
    assert second["steps"] > 0 and second["resumed"] and second["guidance"] == [1, 6]
    assert first["reading"] == second["reading"] > 0, "the heads go on too"
    files = list(guided.iterdir())
    assert len(files) <= 8 and all(path.stat().st_size < 16 * 2**20 for path in files)

    folder = tmp_path / "tiny-hunyuan"
    capsys.readouterr()
    go("hunyuan-export", "--run", guided, "--vae-from", vae, "--to", folder)
    told = capsys.readouterr().out
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae", "tokenizer"):
        size = sum(path.stat().st_size for path in (folder / part).iterdir())
        assert f"{part}: {size} bytes" in told
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert weights < 7e6 and all(path.stat().st_size < 15e6 for path in folder.rglob("*"))
    assert not any(str(tmp_path) in path.read_text() for path in folder.rglob("*.json")), "no path is shipped"

    trained, shipped = make_student(), make_student()
    trained.load(guided)
    shipped.load(folder)
    for (name, a), b in zip(trained.state_dict().items(), shipped.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2, msg=name)

    preset = load_preset("tiny-hunyuan-pooled")
    assert preset.pipeline == "hunyuan_video" and preset.generate.flow_shift == 5
    options = replace(preset.generate, width=32, height=32, frames=9, steps=2)
    pipe = hunyuan_video.load(folder, device="cpu", flow_shift=options.flow_shift)
    hunyuan_video.size_rule_of(pipe).check(128, 128, 61)
    dense = hunyuan_video.generate(pipe, options, CAPTION, seed=0)
    assert dense.shape == (9, 32, 32, 3) and dense.std() > 0
    sparse = preset.sparse.merged({"min_tokens": 0, "keep": 1.0, "dense_above": 1.0, "block": 16})
    with dit_accel.accelerate(pipe, sparse) as handle:
        full = hunyuan_video.generate(pipe, options, CAPTION, seed=0)
        assert handle.report().sparse_calls == 2 * 6
    assert abs(full.astype(int) - dense.astype(int)).max() <= 1


def test_a_guided_run_without_an_unguided_one_is_told_what_to_do(tmp_path):
    from train_tiny import main

    with pytest.raises(SystemExit, match="2"):
        main(["hunyuan-dit", "--out", str(tmp_path), "--mix", "30x9:1:1:1"])
    with pytest.raises(FileNotFoundError, match="train that stage first"):
        main(["hunyuan-export", "--run", str(tmp_path), "--to", str(tmp_path / "to")])
