"""Read what a caption of the shipped small models asks for: the inverse of `scenes.write_caption`."""

from __future__ import annotations

import re

from dit_accel.errors import UsageError
from dit_accel.quality.readings import Expectation, ExpectedObject
from dit_accel.quality.scenes import BACKGROUNDS, COLOURS, MOTION_WORDS, RADII, SHAPES, Scene

_MOTIONS_BY_WORDS = {words: motion for motion, words in MOTION_WORDS.items()}


def _any_of(words) -> str:
    return "|".join(re.escape(word) for word in words)


_OBJECT = (
    rf"an? (?:(?:{_any_of(RADII)}) )?(?P<colour>{_any_of(COLOURS)}) (?P<shape>{_any_of(SHAPES)}) "
    rf"(?P<motion>{_any_of(_MOTIONS_BY_WORDS)})"
)
_GROUND = rf"an? (?P<pan>panning )?(?P<kind>{_any_of(BACKGROUNDS)}) background"
_GRAMMAR = (
    "'a [small|large] COLOUR SHAPE MOTION [and a ...] over a [panning] KIND background'; "
    f"colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; motions {', '.join(_MOTIONS_BY_WORDS)}; "
    f"kinds {', '.join(BACKGROUNDS)}"
)


def expected_from_scene(scene: Scene) -> Expectation:
    """What the judge should read from a faithful rendering of `scene`."""
    objects = tuple(ExpectedObject(o.colour, o.shape, o.motion) for o in scene.objects)
    return Expectation(objects, scene.background.kind, scene.background.panning)


def read_caption(text: str) -> Expectation:
    """Parse a caption in the grammar of `scenes.write_caption`, in any of its wordings.

    Raises:
        UsageError: when anything in the sentence is outside the grammar; nothing is skipped over.
    """
    rest = " ".join(text.lower().strip().rstrip(".").split())
    objects = [
        ExpectedObject(m["colour"], m["shape"], _MOTIONS_BY_WORDS[m["motion"]])
        for m in re.finditer(_OBJECT, rest)
    ]
    grounds = list(re.finditer(_GROUND, rest))
    frame = re.sub(_GROUND, "G", re.sub(_OBJECT, "O", rest))
    if len(grounds) != 1 or not re.fullmatch(
        r"O(( and |, )O)* over G|O over G((, | and )O)*|G with O(( and |, )O)*", frame
    ):
        raise UsageError(f"cannot judge the prompt {text!r}: it is not of the form {_GRAMMAR}")
    return Expectation(tuple(objects), grounds[0]["kind"], grounds[0]["pan"] is not None)
