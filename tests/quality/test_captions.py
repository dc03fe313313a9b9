"""Captions read back to what their scene holds; anything else is refused."""

import random

import pytest

from dit_accel.errors import UsageError
from dit_accel.quality.captions import expected_from_scene, read_caption
from dit_accel.quality.scenes import sample_scene, write_caption


def test_every_wording_reads_back():
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        assert read_caption(write_caption(scene)) == expected_from_scene(scene)
        assert read_caption(write_caption(scene, rng)) == expected_from_scene(scene)


def test_case_and_a_full_stop_do_not_matter():
    read = read_caption("A large red star moving left over a panning checkered background.")
    assert read.objects[0].shape == "star" and read.panning and read.background == "checkered"


@pytest.mark.parametrize(
    "text",
    [
        "a cat on a sofa",
        "",
        "a pink star moving left over a checkered background",
        "a red star moving left",
        "a checkered background",
        "a red star moving left over a checkered background in the rain",
        "a red star moving left over a checkered background with a blue ring spinning",
    ],
    ids=repr,
)
def test_other_sentences_are_refused(text):
    with pytest.raises(UsageError, match="cannot judge the prompt"):
        read_caption(text)
