"""The training of tiny-flux and tiny-sd3: what is trained is what the stock pipelines run, and it learns."""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path

import pytest
import torch

from dit_accel.presets import model_path
from dit_accel.quality.scenes import COLOURS, SHAPES, sample_still, write_caption

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FAMILIES = ("flux", "sd3")
WORDS = {"flux": 64, "sd3": 48}  # tokens that the T5 reads
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def scripts_on_the_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def vae(scripts_on_the_path):
    """An autoencoder with every weight moved."""
    from tiny_image.models import make_vae

    torch.manual_seed(0)
    vae = make_vae().eval().requires_grad_(False)
    for weight in vae.parameters():
        weight += 0.05 * torch.randn_like(weight)
    return vae


@pytest.fixture(scope="module")
def pool(vae):
    from tiny_image.images import Mix, fill_pool
    from tiny_image.text import load_tokenizer

    return fill_pool(vae, load_tokenizer(), random.Random(5), Mix.parse("32:4:1:8"), "cpu")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def make_student(family, text_from=None):
    from tiny_image.dit import make_student

    torch.manual_seed(1)
    return make_student(family, text_from or model_path("tiny-wan"))


class Heard(logging.Handler):
    """Keeps what diffusers and transformers log."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())

    def __enter__(self):
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *_):
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).removeHandler(self)


@torch.no_grad()
def test_a_student_is_called_as_its_pipeline_calls_it(family, vae):
    """One Euler step of the stock pipeline, with guidance, is the student's velocity at pure noise."""
    from dataclasses import replace

    from tiny_image.students import FluxPipeline
    from tiny_image.text import load_tokenizer
    from tiny_models.labels import cover_latents, label_scenes
    from tiny_models.pool import ScenePool

    rng = random.Random(2)
    scene = sample_still(rng, n_objects=2)
    caption, latents = write_caption(scene, rng), torch.randn(1, 4, 16, 24)
    labels = label_scenes([scene], cover_latents([scene], 1, 32, "cpu", 2), 1)
    pool = ScenePool(latents, latents > 0, labels, [scene], [caption], load_tokenizer())
    asked = replace(pool.draw(1), ids=pool.ids)
    student = make_student(family).eval()
    given, other = (
        student(latents, torch.ones(1), replace(asked, ids=ids)) for ids in (pool.ids, pool.empty[0])
    )
    assert not torch.allclose(given, other, atol=1e-3), "the words matter"

    pipe = student.make_pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    start = FluxPipeline._pack_latents(latents, 1, 4, 16, 24) if family == "flux" else latents
    guided = {"flux": "true_cfg_scale", "sd3": "guidance_scale"}[family]
    got = pipe(
        caption, negative_prompt="", height=32, width=48, num_inference_steps=1, latents=start.clone(),
        max_sequence_length=WORDS[family], output_type="latent", return_dict=False, **{guided: 3.0},
    )[0]  # fmt: skip
    if family == "flux":
        got = FluxPipeline._unpack_latents(got, 32, 48, 2)
    torch.testing.assert_close(got, latents - (other + 3 * (given - other)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_encoder_starts_as_that_of_tiny_wan():
    """A T5 is an UMT5 whose layers share a table of positions: with equal tables both say the same."""
    from tiny_image.text import encode, load_encoder, load_tokenizer
    from tiny_models.text import load_encoder as load_umt5

    folder, ids = model_path("tiny-wan"), load_tokenizer()(["a red star over a striped background"]).input_ids
    umt5 = load_umt5(folder, 380)
    first, *others = (block.layer[0].SelfAttention.relative_attention_bias for block in umt5.encoder.block)
    before = umt5(torch.tensor(ids))[0]
    for table in others:
        table.weight.copy_(first.weight)
    after = umt5(torch.tensor(ids))[0]
    got = encode(load_encoder(folder, 380), torch.tensor(ids))
    torch.testing.assert_close(got, after, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)


def test_the_encoder_of_an_image_model_is_its_t5():
    """Its CLIPs have folders too."""
    from tiny_image.text import load_encoder
    from transformers import T5EncoderModel

    shipped = T5EncoderModel.from_pretrained(model_path("tiny-sd3") / "text_encoder_3", dtype=torch.float32)
    for name, tensor in load_encoder(model_path("tiny-sd3"), shipped.config.vocab_size).state_dict().items():
        assert torch.equal(tensor, shipped.state_dict()[name]), name


def test_the_text_stage_teaches_the_encoder(tmp_path):
    from tiny_image.text import train_text
    from tiny_models.reading import TextPace

    train_text(tmp_path, model_path("tiny-wan"), TextPace(0.05, 8, 2e-3, 0, "cpu"))
    history = json.loads((tmp_path / "text.json").read_text())["history"]
    assert history[-1]["step"] > 5 and history[-1]["read"] < 10  # 12 is a guess
    student = make_student("flux", tmp_path)
    assert not torch.equal(
        student.text_encoder.shared.weight, make_student("flux").text_encoder.shared.weight
    )


def test_it_learns_what_it_is_shown(family, pool):
    from tiny_models.learner import Heads, Learner
    from tiny_models.ranks import Ranks

    torch.manual_seed(3)
    student = make_student(family)
    student.tap(student.tapped)
    learner = Learner(student, Heads.make(student, None, None), 3e-3, 0.1, 3.0, Ranks(1, 0, "cpu"))
    drawn = pool.draw(8)
    learner.set_pace(0.0, 200)
    losses = torch.stack([learner.take_step(drawn) for _ in range(10)])
    assert student.hidden.shape == (8, 64, 128)
    first, last = losses[:3].mean(0), losses[-3:].mean(0)
    assert (last < 0.9 * first).all(), (first, last)


def test_a_step_neither_waits_for_the_device_nor_copies_to_it(family, pool, monkeypatch):
    """So that it can be replayed as a CUDA graph. Tensors without data cannot be read; none may come from the host."""
    import contextlib
    import dataclasses

    from tiny_models.learner import Heads, Learner
    from tiny_models.ranks import Ranks
    from torch.utils._python_dispatch import TorchDispatchMode

    class Crossings(TorchDispatchMode):
        found: tuple = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            devices = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                self.found = (*self.found, str(function))
            return out

    def away(labels):
        fields = (getattr(labels, field.name).to("meta") for field in dataclasses.fields(labels))
        return type(labels)(*fields)

    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())  # there is none of such tensors
    student = make_student(family)
    heads = Heads.make(student, None, None)
    student.to("meta")
    heads.modules.to("meta")
    drawn = pool.draw(2)
    given = {field.name: getattr(drawn, field.name) for field in dataclasses.fields(drawn)}
    drawn = type(drawn)(**{k: v.to("meta") if isinstance(v, torch.Tensor) else away(v) for k, v in given.items()})
    student.tap(student.tapped)
    learner = Learner(student, heads, 3e-3, 0.1, 3.0, Ranks(1, 0, "meta"))
    learner.optimisers[0].step = lambda: None  # torch's own, which says itself what it can capture
    learner.take_step(drawn)  # what is made once is made here
    with Crossings() as crossings:
        learner.take_step(drawn)
    assert crossings.found == ()


def test_training_exports_what_the_stock_pipeline_loads_without_a_word(family, vae, tmp_path):
    import diffusers
    from tiny_image.dit import train_image
    from tiny_image.export import export_image
    from tiny_image.images import Mix
    from tiny_image.students import FAMILIES as STUDENTS
    from tiny_models.shards import save_shards
    from tiny_models.stage import StageOptions
    from tiny_models.training import Pace

    save_shards(vae.state_dict(), tmp_path, "vae")
    mix = (Mix.parse("32:2:0.5:2"), Mix.parse("40:2:0.5:2"))
    pace = Pace(minutes=0.005, rate=1e-3, final=0.1, compiled=False, seed=0)

    def go(out, resume):
        options = StageOptions(out, model_path("tiny-wan"), resume, mix, pace, "cpu")
        train_image(family, tmp_path, options)
        return json.loads((out / "dit.json").read_text())

    first = go(tmp_path / "a", None)
    second = go(tmp_path / "b", tmp_path / "a")
    assert first["steps"] > 0 and not first["resumed"] and second["resumed"]
    assert first["reading"] == second["reading"] > 0, "the heads go on too"
    assert len(list((tmp_path / "b").iterdir())) <= 8 and all(
        path.stat().st_size < 16 * 2**20 for path in (tmp_path / "b").iterdir()
    )

    folder = tmp_path / f"tiny-{family}"
    export_image(family, tmp_path / "b", tmp_path, folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 9.2e6
    assert not any(str(tmp_path) in path.read_text() for path in folder.rglob("*.json")), "no path is shipped"
    kind = {"flux": "FluxPipeline", "sd3": "StableDiffusion3Pipeline"}[family]
    with Heard() as heard, torch.no_grad():
        pipe = getattr(diffusers, kind).from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        (image,) = pipe(
            "a red star over a striped background", height=64, width=64, num_inference_steps=1,
            max_sequence_length=WORDS[family], output_type="np",
        ).images  # fmt: skip
    assert heard.said == []
    assert image.shape == (64, 64, 3) and image.std() > 0
    assert pipe.vae_scale_factor == 2 and pipe.default_sample_size * pipe.vae_scale_factor == 256
    assert pipe.tokenizer.model_max_length == 48
    last = pipe.tokenizer_2 if family == "flux" else pipe.tokenizer_3
    assert last.model_max_length == WORDS[family], "the recipe goes by that"

    trained, shipped = make_student(family), make_student(family)
    trained.load(tmp_path / "b")
    shipped.load(folder)
    assert isinstance(shipped, STUDENTS[family])
    for (name, a), b in zip(trained.state_dict().items(), shipped.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2, msg=name)


@torch.no_grad()
def test_normalised_latents_carry_the_same_image(vae):
    import copy

    from tiny_models.autoencoder import normalise_latents

    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mode()
    std, mean = torch.std_mean(latents.transpose(0, 1).flatten(1), 1)
    changed = copy.deepcopy(vae)
    normalise_latents(changed, mean, std)
    after = changed.encode(pixels).latent_dist
    got_std, got_mean = torch.std_mean(after.mode().transpose(0, 1).flatten(1), 1)
    torch.testing.assert_close(got_mean, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(got_std, torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std * std.view(1, -1, 1, 1), posterior.std, atol=1e-4, rtol=1e-4)
    before, now = vae.decode(latents).sample, changed.decode(after.mode()).sample
    torch.testing.assert_close(now, before, atol=1e-4, rtol=1e-4)


def test_the_autoencoder_trains_goes_on_and_is_recorded(tmp_path):
    from tiny_image.models import LATENT_CHANNELS, load_vae
    from tiny_image.vae import VaeOptions, train_vae
    from tiny_models.autoencoder import CodePace

    first = train_vae(VaeOptions(tmp_path / "a", None, CodePace(0.03, 1e-3, 0, "cpu"), 4, 2, 32))
    # another seed: had it begun anew, its weights would be others altogether
    second = train_vae(VaeOptions(tmp_path / "b", tmp_path / "a", CodePace(0.03, 1e-4, 1, "cpu"), 4, 2, 32))
    assert second["resumed"] and not first["resumed"] and first["history"] and second["history"]
    old, vae = (load_vae(tmp_path / name) for name in ("a", "b"))
    before, after = (torch.cat([p.flatten() for p in x.parameters()]) for x in (old, vae))
    assert 0 < float((after - before).norm() / before.norm()) < 0.2
    assert vae.config.latent_channels == LATENT_CHANNELS and vae.config.scaling_factor == 1
    assert json.loads((tmp_path / "b" / "vae.json").read_text())["reconstruction_256"]["images"] == 2


def test_labels_of_stills_say_what_the_image_shows(pool):
    """Objects stand where the labels say, and their motion is nothing to be read."""
    from tiny_models.labels import TokenReader, cover_latents, label_scenes

    rng = random.Random(3)
    scenes = [sample_still(rng, n_objects=1 + index % 2) for index in range(6)]
    labels = label_scenes(scenes, cover_latents(scenes, 1, 128, "cpu", 2), 1)
    assert labels.cover.shape == (6, 2, 1, 32, 32)
    grid = (torch.arange(32) + 0.5) / 32
    for scene, cover, centres, objects in zip(
        scenes, labels.cover, labels.centres, labels.objects, strict=True
    ):
        for slot, thing in enumerate(scene.objects):
            colour, shape, motion = objects[slot].tolist()
            assert (list(COLOURS)[colour], SHAPES[shape], motion) == (thing.colour, thing.shape, -100)
            shown = cover[slot, 0].float()
            middle = torch.stack([(shown.sum(0) * grid).sum(), (shown.sum(1) * grid).sum()]) / shown.sum()
            assert (middle - centres[slot, :, 0]).abs().max() < 1 / 16
    assert TokenReader(16)(torch.randn(6, 1024, 16), labels).isfinite()
    assert (pool.words.objects[:, 1:, 2] == -100).all() and (pool.words.objects[:, 1, 0] >= 0).all()


@pytest.mark.parametrize(
    "text", ["256x1:24:0.5:10", "130:24:0.5:10", "512:24:0.5:10", "16:24:0.5:10", "64:a:1:1"]
)
def test_a_mix_that_cannot_be_is_refused_with_what_is_allowed(text):
    from tiny_image.images import Mix

    with pytest.raises(ValueError, match="SIZE:BATCH:SHARE:IMAGES|a multiple of 8 from 32 to 256"):
        Mix.parse(text)


def test_the_commands_name_their_choices(capsys):
    from train_tiny import main

    for arguments, told in (
        (["image-dit", "flux", "--out", "x", "--mix", "30:1:1:1"], ("multiple of 8",)),
        (["image-dit", "pixart", "--out", "x"], ("flux", "sd3")),
        (["image-dit", "sd3", "--out", "x", "--resume", "y", "--text-from", "z"], ("leave --text-from out",)),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        said = capsys.readouterr().err
        assert all(words in said for words in told)
