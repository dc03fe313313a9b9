"""Prompt accuracy: the share of prompts whose clip or image shows what they ask for, attribute by attribute."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dit_accel.quality.captions import expected_from_scene
from dit_accel.quality.metrics import wilson_interval
from dit_accel.quality.readings import ATTRIBUTES, STILL_ATTRIBUTES, AttributeMatch, Expectation
from dit_accel.quality.scenes import Scene, sample_scene, sample_still, write_caption


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt: every object is a (colour, shape, motion), in stills a pair, that training never showed."""

    index: int
    text: str
    seed: int  # of the initial noise
    expected: Expectation


@dataclass(frozen=True)
class Share:
    """A share with its 95 % Wilson interval."""

    right: int
    of: int

    @property
    def value(self) -> float:
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.of)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}] ({self.right}/{self.of})"


def held_out_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts for clips, the same for the same `seed`; every third has two objects, the others one."""
    return _draw_prompts(count, seed, sample_scene)


def held_out_still_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts for images, the same for the same `seed`; every third has two objects, the others one."""
    return _draw_prompts(count, seed, sample_still)


def _draw_prompts(count: int, seed: int, sample: Callable[..., Scene]) -> list[Prompt]:
    rng = random.Random(seed)
    prompts = []
    for index in range(count):
        scene = sample(rng, held_out=True, n_objects=2 if index % 3 == 2 else 1)
        expected = expected_from_scene(scene)
        prompts.append(Prompt(index, write_caption(scene, rng), 1000 * seed + index, expected))
    return prompts


def measure_accuracy(matches: Sequence[AttributeMatch], *, still: bool = False) -> dict[str, Share]:
    """One share for each attribute and for all of them together (`everything`); for clips also one for panning.

    Args:
        still: whether the matches are of images, which have no motion to be right or wrong about.
    """
    names = (*STILL_ATTRIBUTES, "everything") if still else (*ATTRIBUTES, "panning", "everything")
    return {name: Share(sum(getattr(match, name) for match in matches), len(matches)) for name in names}
