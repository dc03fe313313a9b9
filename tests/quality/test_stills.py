"""Stills: their captions read back, training never shows the held-out pairs, and the judge reads images."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dit_accel.errors import UsageError
from dit_accel.quality.captions import expected_from_scene, read_caption
from dit_accel.quality.degrade import DEGRADATIONS
from dit_accel.quality.judge import judge_image, matches
from dit_accel.quality.prompt_accuracy import held_out_prompts, held_out_still_prompts, measure_accuracy
from dit_accel.quality.readings import STILL_ATTRIBUTES
from dit_accel.quality.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTION_WORDS,
    SHAPES,
    STILL,
    is_held_out_still,
    render_scenes,
    sample_scene,
    sample_still,
    write_caption,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PER_KIND = 52  # x 5 kinds; 104 of each were all right
VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "background": BACKGROUNDS}


def draw(scene, degrade=None, seed=0, size=256):
    image = (render_scenes([scene], 1, size, size)[0] / 2 + 0.5).clamp(0, 1)
    image = degrade(image, seed) if degrade else image
    return (image[:, 0].permute(1, 2, 0) * 255).round().to(torch.uint8)


def change_one(expected, attribute, rng):
    if attribute == "background":
        return replace(expected, background=rng.choice([b for b in BACKGROUNDS if b != expected.background]))
    objects = list(expected.objects)
    taken = {o.colour for o in objects} if attribute == "colour" else {objects[0].shape}
    value = rng.choice([v for v in VALUES[attribute] if v not in taken])
    objects[0] = replace(objects[0], **{attribute: value})
    return replace(expected, objects=tuple(objects))


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_reads_rendered_images_and_rejects_changed_prompts(kind):
    rng = random.Random(kind)
    right, rejected = Counter(), Counter()
    for index in range(PER_KIND):
        scene = sample_still(rng, held_out=index % 2 == 1)
        expected = expected_from_scene(scene)
        reading = judge_image(draw(scene, DEGRADATIONS[kind], seed=index, size=(128, 256)[index // 2 % 2]))
        for attribute in STILL_ATTRIBUTES:
            right[attribute] += getattr(matches(reading, expected), attribute)
            changed = change_one(expected, attribute, rng)
            rejected[attribute] += not getattr(matches(reading, changed), attribute)
        right["count"] += matches(reading, expected).count
        assert all(o.motion == STILL for o in reading.objects) and not reading.panning
    print(f"{kind}: of {PER_KIND} right {dict(right)}, changed prompts rejected {dict(rejected)}")
    for attribute in (*STILL_ATTRIBUTES, "count"):
        assert right[attribute] >= 0.97 * PER_KIND, (kind, attribute, right)
    for attribute in STILL_ATTRIBUTES:
        assert rejected[attribute] >= 0.95 * PER_KIND, (kind, attribute, rejected)


def test_captions_of_stills_have_no_motion_and_read_back():
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_still(rng)
        caption = write_caption(scene, rng)
        assert not any(words in caption for words in (*MOTION_WORDS.values(), "panning"))
        assert read_caption(caption, still=True) == expected_from_scene(scene)
        with pytest.raises(UsageError, match="cannot judge the prompt"):
            read_caption(caption)
        with pytest.raises(UsageError, match="cannot judge the prompt"):
            read_caption(write_caption(sample_scene(rng), rng), still=True)
    with pytest.raises(UsageError, match="cannot judge the prompt"):
        read_caption("a red star over a panning striped background", still=True)


def test_objects_stand_from_left_to_right_and_apart():
    rng = random.Random(1)
    for _ in range(50):
        left, right = sample_still(rng, n_objects=2).objects
        assert left.x < right.x and left.colour != right.colour
    scene = sample_still(rng, n_objects=2)
    first, last = render_scenes([scene], 5, 32, 32)[0][:, [0, 4]].unbind(1)
    assert torch.equal(first, last), "nothing moves in a still"


def test_training_never_shows_a_held_out_pair():
    rng = random.Random(0)
    shown = {(o.colour, o.shape) for _ in range(600) for o in sample_still(rng).objects}
    held = {(o.colour, o.shape) for _ in range(200) for o in sample_still(rng, held_out=True).objects}
    assert len(shown) == 24 and len(held) == 6 and not shown & held
    assert held == {(c, s) for c in COLOURS for s in SHAPES if is_held_out_still(c, s)}
    assert {c for c, _ in held} == set(COLOURS) and {s for _, s in held} == set(SHAPES)


def test_accuracy_of_images_leaves_motion_out():
    prompts = held_out_still_prompts(6, seed=3)
    assert prompts == held_out_still_prompts(6, seed=3) != held_out_still_prompts(6, seed=4)
    assert [len(p.expected.objects) for p in prompts] == [1, 1, 2, 1, 1, 2]
    image = draw(sample_still(random.Random(3), held_out=True, n_objects=1))  # the first prompt's own scene
    found = measure_accuracy([matches(judge_image(image), prompts[0].expected)], still=True)
    assert set(found) == {*STILL_ATTRIBUTES, "everything"} and found["everything"].right == 1


def test_prompts_of_clips_are_what_they_were():
    """Records of tiny-wan compare prompts by their number."""
    assert [p.text for p in held_out_prompts(3, seed=1)] == [
        "a red ring moving left over a striped background",
        "a green star moving left over a striped background",
        "a red ring moving left over a checkered background, a small cyan circle spinning",
    ]


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(3, 32, 32), torch.zeros(1, 32, 32, 3), torch.zeros(32, 32, 3, dtype=torch.int32)],
    ids=["channels first", "a clip", "int32"],
)
def test_images_that_cannot_be_judged(pixels):
    with pytest.raises(UsageError, match="an image to judge is"):
        judge_image(pixels)
