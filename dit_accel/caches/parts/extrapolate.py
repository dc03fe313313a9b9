"""Continue a tensor that was seen at some places of a run to the next one.

The polynomial of divided differences, whose places need not be even: over the noise level, which falls by steps that
differ more than threefold with shifted flow schedules, or over the number of the step, whose places are uneven too
where steps in between were made up. Which of the two is smoother is the model's and the schedule's business
(docs/caches.md): try both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_accel.caches.cache import Parts


def extrapolate(seen: Sequence[tuple[float, Tensor]], place: float, order: int) -> Tensor:
    """The polynomial through the latest samples, at another place.

    Args:
        seen: (place, tensor), the newest last; places fall.
        order: of the polynomial; fewer samples lower it. 0 holds the newest.

    Returns:
        in the newest tensor's shape and dtype; differences are taken in fp32.
    """
    newest = seen[-1][1]
    samples = dict(reversed(seen[-(order + 1) :]))  # noise levels that bf16 rounds to one another count once
    if len(samples) == 1:
        return newest.clone()
    total = torch.zeros_like(newest, dtype=torch.float32)
    for weight, tensor in zip(_lagrange(list(samples), place), samples.values(), strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total.to(newest.dtype)


def extrapolate_parts(seen: Sequence[tuple[float, Parts]], place: float, order: int) -> Parts:
    """What blocks add to the tokens of image or video, and of text where they return these, continued alike."""
    hidden = extrapolate([(at, parts[0]) for at, parts in seen], place, order)
    if any(parts[1] is None for _, parts in seen):
        return hidden, None
    return hidden, extrapolate([(at, parts[1]) for at, parts in seen], place, order)


def _lagrange(nodes: list[float], at: float) -> list[float]:
    """Weights of the samples at `nodes`; the same polynomial as Newton's form, without stored differences."""
    weights = []
    for i, node in enumerate(nodes):
        weight = 1.0
        for j, other in enumerate(nodes):
            if i != j:
                weight *= (at - other) / (node - other)
        weights.append(weight)
    return weights
