"""What was read out of a clip, what was expected of it, and which attributes agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

ATTRIBUTES = ("colour", "shape", "motion", "background")
STILL_ATTRIBUTES = ("colour", "shape", "background")  # of an image, in which every object is still


@dataclass(frozen=True)
class ObjectReading:
    """One object as seen in the pixels. Lengths are fractions of the frame's shorter side.

    `shape` is one of the scenes' shapes or `unclear`; `motion` one of their motions, `still` (it only stays) or
    `unclear` (no closed form fits).
    """

    colour: str
    shape: str
    motion: str
    centres: tuple[tuple[float, float], ...]  # x right, y down; NaN in frames where the object is missing
    radii: tuple[float, ...]  # circumradius, NaN where missing
    presence: float  # share of frames that show it
    fit: float  # agreement with the best template in [0, 1]
    turns: float  # whole rotations during the clip, signed
    growth: float  # last radius over first


@dataclass(frozen=True)
class Reading:
    """Everything the judge read from one clip. `pan` is the drift during the clip, in fractions of the frame."""

    objects: tuple[ObjectReading, ...]
    background: str
    pan: tuple[float, float]

    @property
    def panning(self) -> bool:
        return self.pan != (0.0, 0.0)


@dataclass(frozen=True)
class ExpectedObject:
    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Expectation:
    """What a prompt asks for. Sizes are not judged: the words are relative and generated sizes vary freely."""

    objects: tuple[ExpectedObject, ...]
    background: str
    panning: bool


@dataclass(frozen=True)
class AttributeMatch:
    """Which attributes are right. With two objects an attribute is right only if it is right for both."""

    colour: bool  # also wrong when there are more or fewer objects than asked for
    shape: bool
    motion: bool
    background: bool  # the kind of texture alone
    panning: bool
    count: bool

    @property
    def everything(self) -> bool:
        """The four attributes of prompt accuracy together (panning is reported, not counted)."""
        return all(getattr(self, name) for name in ATTRIBUTES)


def matches(reading: Reading, expected: Expectation) -> AttributeMatch:
    """Compare a reading with an expectation, attribute by attribute.

    Objects are paired by colour; those left over are paired so that most attributes agree. An expected object
    without a partner has every attribute wrong.
    """
    pairs = _pair_objects(reading.objects, expected.objects)
    count = len(reading.objects) == len(expected.objects)

    def all_right(name: str) -> bool:
        return all(seen is not None and getattr(seen, name) == getattr(want, name) for want, seen in pairs)

    return AttributeMatch(
        colour=count and all_right("colour"),
        shape=all_right("shape"),
        motion=all_right("motion"),
        background=reading.background == expected.background,
        panning=reading.panning == expected.panning,
        count=count,
    )


def _pair_objects(
    seen: Sequence[ObjectReading], wanted: Sequence[ExpectedObject]
) -> list[tuple[ExpectedObject, ObjectReading | None]]:
    slots: list[ObjectReading | None] = [*seen, *[None] * len(wanted)]

    def score(order: tuple[ObjectReading | None, ...]) -> tuple[int, int]:
        found = [(want, thing) for want, thing in zip(wanted, order, strict=True) if thing is not None]
        colours = sum(want.colour == thing.colour for want, thing in found)
        others = sum((want.shape == thing.shape) + (want.motion == thing.motion) for want, thing in found)
        return colours, others + len(found)

    best = max(permutations(slots, len(wanted)), key=score)
    return list(zip(wanted, best, strict=True))
