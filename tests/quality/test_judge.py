"""The judge reads rendered clips, also degraded ones, and rejects a prompt that differs in one attribute.

`scripts/measure_judge.py` prints the same figures in full, 512 clips for every degradation.
"""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.quality.degrade import DEGRADATIONS, round_trip
from dit_accel.quality.judge import expected_from_scene, judge_clip, matches
from dit_accel.quality.readings import ATTRIBUTES, ExpectedObject
from dit_accel.quality.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Background,
    Scene,
    SceneObject,
    render_scenes,
    sample_scene,
)

# Beside four busy processes on two cores 26 clips took 54 s on two threads, 13 s on one; a test has 104, and 300 s.
pytestmark = pytest.mark.usefixtures("one_thread")

PER_KIND = 104  # x 5 kinds = 520 clips
VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}
GREY = Background("cloudy", (0.0, 0.0), (0.3, 0.3, 0.3), (0.5, 0.5, 0.5), 0.3, 0.0, 0.2, 7)


def draw(scene, degrade=None, seed=0, frames=17, height=128, width=128):
    clip = (render_scenes([scene], frames, height, width)[0] / 2 + 0.5).clamp(0, 1)
    clip = degrade(clip, seed) if degrade else clip
    return (clip.permute(1, 2, 3, 0) * 255).round().clamp(0, 255).to(torch.uint8)


def place(colour="red", shape="star", motion="left", x=0.5, y=0.5, size="medium", phase=0.3):
    return SceneObject(colour, shape, size, motion, x, y, 0.45, 1, phase)


def change_one(expected, attribute, rng):
    if attribute == "background":
        return replace(expected, background=rng.choice([b for b in BACKGROUNDS if b != expected.background]))
    objects = list(expected.objects)
    taken = {o.colour for o in objects} if attribute == "colour" else {getattr(objects[0], attribute)}
    value = rng.choice([v for v in VALUES[attribute] if v not in taken])
    objects[0] = replace(objects[0], **{attribute: value})
    return replace(expected, objects=tuple(objects))


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_reads_rendered_clips_and_rejects_changed_prompts(kind):
    rng = random.Random(kind)
    right, rejected = Counter(), Counter()
    for index in range(PER_KIND):
        scene = sample_scene(rng, held_out=index % 2 == 1)
        expected = expected_from_scene(scene)
        reading = judge_clip(draw(scene, DEGRADATIONS[kind], seed=index))
        for attribute in ATTRIBUTES:
            right[attribute] += getattr(matches(reading, expected), attribute)
            changed = change_one(expected, attribute, rng)
            rejected[attribute] += not getattr(matches(reading, changed), attribute)
        right["panning"] += reading.panning == expected.panning
    for attribute in (*ATTRIBUTES, "panning"):
        assert right[attribute] >= 0.97 * PER_KIND, (kind, attribute, right)
    for attribute in ATTRIBUTES:
        assert rejected[attribute] >= 0.95 * PER_KIND, (kind, attribute, rejected)


@pytest.mark.parametrize(
    ("height", "width", "frames"), [(352, 352, 33), (128, 192, 17), (64, 64, 9)], ids=str
)
def test_other_sizes(height, width, frames):
    rng = random.Random(3)
    for _ in range(6):
        scene = sample_scene(rng)
        reading = judge_clip(draw(scene, frames=frames, height=height, width=width))
        assert matches(reading, expected_from_scene(scene)).everything, scene


def test_uint8_and_float_read_alike():
    frames = draw(Scene((place(),), GREY))
    assert judge_clip(frames) == judge_clip(frames.float() / 255) == judge_clip(frames.numpy())


def test_positions_and_sizes_are_measured():
    thing = place(motion="right", shape="circle", y=0.4)
    (seen,) = judge_clip(draw(Scene((thing,), GREY), frames=33)).objects
    (x0, y0), (x1, y1) = seen.centres[0], seen.centres[-1]
    assert x1 - x0 == pytest.approx(0.45, abs=0.02)
    assert y0 == pytest.approx(0.4, abs=0.03) and y1 == pytest.approx(0.4, abs=0.03)
    assert np.mean(seen.radii) == pytest.approx(0.14, rel=0.05)
    assert seen.presence == 1


def test_an_empty_scene_has_no_objects():
    reading = judge_clip(draw(Scene((), GREY)))
    assert reading.objects == () and reading.background == "cloudy" and not reading.panning
    grey = judge_clip(torch.full((9, 64, 64, 3), 0.4))
    assert grey.objects == () and grey.background == "plain"


def test_missing_and_extra_objects_are_wrong():
    one = Scene((place(),), GREY)
    two = Scene((place(x=0.3, y=0.2), place("blue", "ring", "up", 0.8, 0.7)), GREY)
    assert not matches(judge_clip(draw(one)), expected_from_scene(two)).colour
    assert not matches(judge_clip(draw(one)), expected_from_scene(two)).shape
    match = matches(judge_clip(draw(two)), expected_from_scene(one))
    assert not match.count and not match.colour


def test_two_objects_of_one_colour_are_two_objects():
    scene = Scene((place(x=0.5, y=0.2), place(x=0.5, y=0.75, motion="right", shape="square")), GREY)
    seen = judge_clip(draw(scene)).objects
    assert {(o.colour, o.shape, o.motion) for o in seen} == {
        ("red", "star", "left"),
        ("red", "square", "right"),
    }


def test_attributes_belong_to_their_object():
    scene = Scene((place(x=0.5, y=0.2), place("blue", "ring", "up", 0.85, 0.62)), GREY)
    expected = expected_from_scene(scene)
    reading = judge_clip(draw(scene))
    assert matches(reading, expected).everything
    a, b = expected.objects
    swapped = replace(expected, objects=(replace(a, motion=b.motion), replace(b, motion=a.motion)))
    assert not matches(reading, swapped).motion


def test_a_frozen_object_moves_in_no_named_way():
    frames = draw(Scene((place(motion="spin"),), GREY))[:1].repeat(17, 1, 1, 1)
    (seen,) = judge_clip(frames).objects
    assert seen.motion == "still"


def test_a_growing_object_played_backwards_does_not_grow():
    frames = draw(Scene((place(motion="grow"),), GREY)).flip(0)
    (seen,) = judge_clip(frames).objects
    assert seen.motion == "unclear"


def test_a_shuffled_clip_is_not_a_motion():
    frames = draw(Scene((place(motion="left"),), GREY), frames=33)
    frames = frames[torch.randperm(33, generator=torch.Generator().manual_seed(0))]
    assert judge_clip(frames).objects[0].motion == "unclear"


def test_matching_pairs_left_over_objects_by_best_agreement():
    scene = Scene((place(x=0.5, y=0.2), place("blue", "ring", "up", 0.85, 0.62)), GREY)
    reading = judge_clip(draw(scene))
    expected = replace(
        expected_from_scene(scene),
        objects=(ExpectedObject("red", "star", "left"), ExpectedObject("green", "ring", "up")),
    )
    match = matches(reading, expected)
    assert not match.colour and match.shape and match.motion and match.count


def test_a_foreign_form_is_no_shape():
    frames = draw(Scene((), GREY))
    for t in range(17):
        frames[t, 60:64, 10 + t : 90 + t] = torch.tensor([235, 25, 30], dtype=torch.uint8)
    (seen,) = judge_clip(frames).objects
    assert (seen.colour, seen.shape) == ("red", "unclear")


def test_a_clip_of_one_colour_shows_no_opposite_object():
    frames = torch.tensor([0.1, 0.85, 0.9]).repeat(9, 64, 64, 1)
    frames[:, 20:30, 20:30] = 0.5
    assert "red" not in {o.colour for o in judge_clip(frames).objects}


@pytest.mark.parametrize(
    "frames",
    [torch.zeros(9, 3, 32, 32), torch.zeros(2, 32, 32, 3), torch.zeros(9, 32, 32, 3, dtype=torch.int32)],
    ids=["channels first", "too short", "int32"],
)
def test_clips_that_cannot_be_judged(frames):
    with pytest.raises(UsageError, match="a clip to judge is"):
        judge_clip(frames)


def test_a_broken_generation_is_named():
    with pytest.raises(UsageError, match="NaN"):
        judge_clip(torch.full((9, 32, 32, 3), torch.nan))


def test_after_the_shipped_autoencoder():
    from dit_accel.presets import model_path, shipped_models

    if "tiny-wan" not in shipped_models():
        pytest.skip("tiny-wan is not in this tree")
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKLWan.from_pretrained(
        model_path("tiny-wan") / "vae", torch_dtype=torch.float32
    ).eval()
    rng = random.Random(11)
    right = Counter()
    for index in range(8):
        scene = sample_scene(rng, held_out=index % 2 == 1)
        reading = judge_clip(draw(scene, lambda clip, seed: round_trip(vae, clip), frames=33))
        match = matches(reading, expected_from_scene(scene))
        right.update(a for a in ATTRIBUTES if getattr(match, a))
    assert all(right[a] >= 7 for a in ATTRIBUTES), right
