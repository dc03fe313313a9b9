"""Prompt accuracy: the share of prompts whose clip shows what they ask for, attribute by attribute."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dit_accel.quality.captions import expected_from_scene
from dit_accel.quality.metrics import wilson_interval
from dit_accel.quality.readings import ATTRIBUTES, AttributeMatch, Expectation
from dit_accel.quality.scenes import sample_scene, write_caption


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt: every object is a (colour, shape, motion) that training never showed."""

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
    """The same prompts for the same `seed`; every third has two objects, the others one."""
    rng = random.Random(seed)
    prompts = []
    for index in range(count):
        scene = sample_scene(rng, held_out=True, n_objects=2 if index % 3 == 2 else 1)
        expected = expected_from_scene(scene)
        prompts.append(Prompt(index, write_caption(scene, rng), 1000 * seed + index, expected))
    return prompts


def measure_accuracy(matches: Sequence[AttributeMatch]) -> dict[str, Share]:
    """One share for each attribute, for panning, and for all four attributes together (`everything`)."""
    names: Iterable[str] = (*ATTRIBUTES, "panning", "everything")
    return {name: Share(sum(getattr(match, name) for match in matches), len(matches)) for name in names}
