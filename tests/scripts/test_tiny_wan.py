"""The training of tiny-wan: its shortcuts equal the stock model, and what ships is what it wrote."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from dit_accel.presets import model_path
from dit_accel.quality.scenes import COLOURS, MOTIONS, SHAPES, is_held_out, sample_scene

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
BASE_DIM = 8


@pytest.fixture(scope="module", autouse=True)
def scripts_on_the_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def pair(scripts_on_the_path):
    """A VAE as it is trained, with every weight moved, and the stock VAE it is exported to."""
    from tiny_wan.vae import export_vae, make_trainable_vae

    torch.manual_seed(0)
    trained = make_trainable_vae(BASE_DIM).eval()
    for weight in trained.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    return trained, export_vae(trained, BASE_DIM, [0.0] * 16, [1.0] * 16)


@pytest.mark.parametrize("frames", [1, 5, 9])
@torch.no_grad()
def test_coding_a_clip_in_one_pass_equals_the_chunked_stock_vae(pair, frames):
    from tiny_wan.vae import decode_clip, encode_clip

    trained, stock = pair
    clip = torch.rand(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    moments = encode_clip(trained, clip)
    torch.testing.assert_close(moments, stock.encode(clip).latent_dist.parameters, rtol=1e-4, atol=1e-4)
    latents = moments[:, :16]
    whole = decode_clip(trained, latents).clamp(-1, 1)
    assert whole.shape == clip.shape
    torch.testing.assert_close(whole, stock.decode(latents, return_dict=False)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_frame_is_coded_without_frames_two_latents_away(pair):
    """What keeps long clips as good as short ones: the receptive field in time is bounded."""
    _, stock = pair
    latents = torch.randn(1, 16, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = latents.clone()
    changed[:, :, 1] += 1
    before, after = (stock.decode(x, return_dict=False)[0] for x in (latents, changed))
    differs = (before != after).flatten(3).any(-1).flatten(0, 1).any(0)  # per frame
    assert differs[1] and not differs[0] and not differs[7:].any()


def test_shards_come_back_and_stay_small(tmp_path, monkeypatch):
    from tiny_models import shards

    monkeypatch.setattr(shards, "SHARD_BYTES", 5000)
    tensors = {f"w{i}": torch.randn(500) for i in range(5)}
    paths = shards.save_shards(tensors, tmp_path, "part")
    assert len(paths) == 3
    back = shards.load_shards(tmp_path, "part")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    with pytest.raises(FileNotFoundError, match="train that stage first"):
        shards.load_shards(tmp_path, "other")


def test_training_never_shows_a_held_out_combination():
    rng = random.Random(0)
    shown = [o for _ in range(300) for o in sample_scene(rng).objects]
    assert not any(is_held_out(o.colour, o.shape, o.motion) for o in shown)
    held = [o for _ in range(100) for o in sample_scene(rng, held_out=True).objects]
    assert all(is_held_out(o.colour, o.shape, o.motion) for o in held)
    combinations = [(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS]
    assert sum(is_held_out(*each) for each in combinations) == len(combinations) // len(MOTIONS)


def test_the_shipped_model_is_small_and_has_the_trained_layout(scripts_on_the_path):
    from tiny_models.text import make_text_encoder
    from tiny_wan.models import make_tokenizer, make_transformer, make_vae

    files = [path for path in model_path("tiny-wan").rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 15e6
    assert sum(path.stat().st_size for path in files) <= 24e6
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(model_path("tiny-wan"), dtype=torch.float32)
    for shipped, fresh in (
        (pipe.transformer, make_transformer()),
        (pipe.text_encoder, make_text_encoder(len(make_tokenizer()))),
        (pipe.vae, make_vae(pipe.vae.config.base_dim)),
    ):
        assert {k: v.shape for k, v in shipped.state_dict().items()} == {
            k: v.shape for k, v in fresh.state_dict().items()
        }
    assert pipe.tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_labels_say_what_the_clip_shows(scripts_on_the_path):
    from tiny_models.labels import cover_latents, label_scenes

    rng = random.Random(3)
    scenes = [sample_scene(rng) for _ in range(12)]
    labels = label_scenes(scenes, cover_latents(scenes, 9, 128, "cpu"), 9)
    assert labels.cover.shape == (12, 2, 5, 16, 16)
    grid = (torch.arange(16) + 0.5) / 16
    for scene, cover, centres, objects in zip(
        scenes, labels.cover, labels.centres, labels.objects, strict=True
    ):
        assert [thing.x for thing in scene.objects] == sorted(thing.x for thing in scene.objects)
        for slot, thing in enumerate(scene.objects):
            named = [list(COLOURS)[objects[slot, 0]], SHAPES[objects[slot, 1]], MOTIONS[objects[slot, 2]]]
            assert named == [thing.colour, thing.shape, thing.motion]
            shown = cover[slot].float()
            middle_x = (shown.sum(1) * grid).sum(-1) / shown.sum((1, 2))
            middle_y = (shown.sum(2) * grid).sum(-1) / shown.sum((1, 2))
            assert (torch.stack([middle_x, middle_y]) - centres[slot]).abs().max() < 1 / 16
        if len(scene.objects) == 1:
            assert not cover[1].any() and (objects[1] == -100).all()


def test_a_reader_that_knows_the_truth_is_hardly_wrong(scripts_on_the_path):
    from tiny_models.labels import TokenReader, cover_latents, label_scenes

    rng = random.Random(4)
    scenes = [sample_scene(rng) for _ in range(6)]
    labels = label_scenes(scenes, cover_latents(scenes, 5, 128, "cpu"), 5)
    reader = TokenReader(16)
    hidden = torch.randn(6, 3 * 16 * 16, 16, generator=torch.Generator().manual_seed(0))
    sure = torch.full((6, 3 * 16 * 16, sum(reader.sizes)), -20.0)
    cover = labels.cover.flatten(2).transpose(1, 2)
    sure[..., :2][cover] = 20.0
    start = 6
    for place, count in enumerate(reader.sizes[2:]):
        if place < 3:
            truth = labels.objects[:, :, place].clamp(min=0).gather(1, cover.float().argmax(-1))
        else:
            truth = labels.ground[:, place - 3, None].expand(-1, cover.shape[1])
        sure[..., start : start + count].scatter_(-1, truth[..., None], 20.0)
        start += count
    xs, ys = ((torch.arange(16) + 0.5) / 16).expand(3, 16, 16), ((torch.arange(16) + 0.5) / 16)[:, None]
    here = torch.stack([xs, ys.expand(3, 16, 16)], -1).reshape(1, -1, 1, 2)
    centres = labels.centres.permute(0, 3, 1, 2)[:, :, None].expand(-1, -1, 256, -1, -1).flatten(1, 2)
    sure[..., 2:6] = (centres - here).flatten(2)
    guess = reader(hidden, labels)
    reader.read.forward = lambda _: sure
    assert reader(hidden, labels) < 1e-3 < guess


def test_training_goes_on_from_what_ships_and_saves_it(scripts_on_the_path, tmp_path):
    from safetensors.torch import load_file
    from tiny_models.clips import Mix
    from tiny_models.training import Pace
    from tiny_wan.dit import DitOptions, train_dit

    shipped = model_path("tiny-wan")
    mix = (Mix.parse("32x9:2:1:2"),)
    pace = Pace(minutes=0.05, rate=1e-3, final=0.1, compiled=False, seed=0)
    train_dit(DitOptions(tmp_path, shipped, shipped, shipped, mix, pace, "cpu"))
    parts = {k: v for path in tmp_path.glob("dit-*.safetensors") for k, v in load_file(path).items()}
    before = {k: v for path in shipped.glob("transformer/*.safetensors") for k, v in load_file(path).items()}
    assert parts.keys() == before.keys()
    assert all(v.isfinite().all() for v in parts.values())
    assert any(not torch.equal(v, before[k].float()) for k, v in parts.items())


def test_batched_muon_moves_weights_as_torch_does(scripts_on_the_path):
    from tiny_models.muon import BatchedMuon

    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (8, 8), (8, 24), (24, 8)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    batched = BatchedMuon(ours, lr=0.02, weight_decay=0.1)
    stock = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        batched.step()
        stock.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


@torch.no_grad()
def test_attention_of_the_trainer_equals_the_stock_one(scripts_on_the_path):
    from tiny_wan.attention import FusedRotaryProcessor
    from tiny_wan.models import make_transformer

    torch.manual_seed(0)
    transformer = make_transformer().eval()
    inputs = torch.randn(2, 16, 3, 8, 12), torch.tensor([900.0, 30.0]), torch.randn(2, 512, 128)
    stock = transformer(*inputs, return_dict=False)[0]
    for block in transformer.blocks:
        block.attn1.set_processor(FusedRotaryProcessor())
    ours = transformer(*inputs, return_dict=False)[0]
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_every_word_is_labelled_with_what_it_speaks_of(scripts_on_the_path):
    from tiny_models.captions import CaptionReader, tokenise
    from tiny_wan.models import make_tokenizer

    from dit_accel.quality.scenes import write_caption

    rng, tokenizer = random.Random(5), make_tokenizer()
    scenes = [sample_scene(rng, n_objects=1 + index % 2) for index in range(24)]
    captions = [write_caption(scene, rng) for scene in scenes]
    ids, mask, labels = tokenise(tokenizer, captions, scenes)
    for row, scene in enumerate(scenes):
        assert ((labels.owner[row] == -100) == (mask[row] == 0)).all()
        for place, thing in enumerate(scene.objects, start=1):
            spoken = tokenizer.decode(ids[row][labels.owner[row] == place])
            assert thing.colour in spoken and thing.shape in spoken and scene.background.kind not in spoken
            assert list(COLOURS)[labels.objects[row, place, 0]] == thing.colour
        if len(scene.objects) == 1:
            assert (labels.objects[row, 2] == -100).all() and not (labels.owner[row] == 2).any()
    assert CaptionReader(8)(torch.randn(24, 48, 8), labels).isfinite()


def test_the_encoder_learns_which_words_belong_together(scripts_on_the_path, tmp_path):
    """From the shipped encoder, in seconds: the loss of reading falls and what the transformer knows stays near."""
    import json

    from tiny_models.reading import TextPace
    from tiny_wan.text import train_text

    train_text(tmp_path, model_path("tiny-wan"), TextPace(0.15, 16, 2e-3, 0, "cpu"))
    history = json.loads((tmp_path / "text.json").read_text())["history"]
    assert history[-1]["step"] > 5 and history[-1]["read"] < 12
    assert (tmp_path / "text-1.safetensors").is_file() and (tmp_path / "words-1.safetensors").is_file()


@pytest.mark.parametrize("text", ["128x33:24:0.5", "130x33:24:0.5:10", "128x34:24:0.5:10", "128x33:a:0.5:10"])
def test_a_mix_that_cannot_be_is_refused_with_what_is_allowed(scripts_on_the_path, text):
    from tiny_models.clips import Mix

    with pytest.raises(ValueError, match="SIZExFRAMES:BATCH:SHARE:CLIPS|multiple of 16"):
        Mix.parse(text)
