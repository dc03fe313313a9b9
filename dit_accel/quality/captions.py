"""Read what a caption of the shipped small models asks for: the inverse of `scenes.write_caption`."""

from __future__ import annotations

import re

from dit_accel.errors import UsageError
from dit_accel.quality.readings import Expectation, ExpectedObject
from dit_accel.quality.scenes import BACKGROUNDS, COLOURS, MOTION_WORDS, RADII, SHAPES, STILL, Scene

_MOTIONS_BY_WORDS = {words: motion for motion, words in MOTION_WORDS.items()}


def _any_of(words) -> str:
    return "|".join(re.escape(word) for word in words)


_THING = rf"an? (?:(?:{_any_of(RADII)}) )?(?P<colour>{_any_of(COLOURS)}) (?P<shape>{_any_of(SHAPES)})"
_MOVING = rf"{_THING} (?P<motion>{_any_of(_MOTIONS_BY_WORDS)})"
_GROUND = rf"an? (?P<pan>panning )?(?P<kind>{_any_of(BACKGROUNDS)}) background"
_NAMES = f"colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; kinds {', '.join(BACKGROUNDS)}"
_GRAMMAR = (
    "'a [small|large] COLOUR SHAPE MOTION [and a ...] over a [panning] KIND background'; "
    f"motions {', '.join(_MOTIONS_BY_WORDS)}; {_NAMES}"
)
_STILL_GRAMMAR = f"'a [small|large] COLOUR SHAPE [and a ...] over a KIND background'; {_NAMES}"


def expected_from_scene(scene: Scene) -> Expectation:
    """What the judge should read from a faithful rendering of `scene`."""
    objects = tuple(ExpectedObject(o.colour, o.shape, o.motion) for o in scene.objects)
    return Expectation(objects, scene.background.kind, scene.background.panning)


def read_caption(text: str, *, still: bool = False) -> Expectation:
    """Parse a caption in the grammar of `scenes.write_caption`, in any of its wordings.

    Args:
        still: whether it describes a still, which has no word for motion; a clip's caption has one for every object.

    Raises:
        UsageError: when anything in the sentence is outside the grammar; nothing is skipped over.
    """
    rest = " ".join(text.lower().strip().rstrip(".").split())
    thing = _THING if still else _MOVING
    objects = [
        ExpectedObject(m["colour"], m["shape"], STILL if still else _MOTIONS_BY_WORDS[m["motion"]])
        for m in re.finditer(thing, rest)
    ]
    grounds = list(re.finditer(_GROUND, rest))
    frame = re.sub(_GROUND, "G", re.sub(thing, "O", rest))
    if (
        len(grounds) != 1
        or (still and grounds[0]["pan"])
        or not re.fullmatch(r"O(( and |, )O)* over G|O over G((, | and )O)*|G with O(( and |, )O)*", frame)
    ):
        wanted = _STILL_GRAMMAR if still else _GRAMMAR
        raise UsageError(f"cannot judge the prompt {text!r}: it is not of the form {wanted}")
    return Expectation(tuple(objects), grounds[0]["kind"], grounds[0]["pan"] is not None)
