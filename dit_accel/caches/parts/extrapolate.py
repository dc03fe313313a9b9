"""Continue a tensor that was seen at some noise levels to the next one.

The polynomial of divided differences over the noise level, not over the number of the step: with shifted flow
schedules the noise level falls by steps that differ more than threefold, and formulas for even steps are wrong from
the second order on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def extrapolate(seen: Sequence[tuple[float, Tensor]], noise: float, order: int) -> Tensor:
    """The polynomial through the latest samples, at another noise level.

    Args:
        seen: (noise level, tensor), the newest last; noise levels fall.
        order: of the polynomial; fewer samples lower it. 0 holds the newest.

    Returns:
        in the newest tensor's shape and dtype; differences are taken in fp32.
    """
    newest = seen[-1][1]
    samples = dict(reversed(seen[-(order + 1) :]))  # levels that bf16 rounds to one another count once
    if len(samples) == 1:
        return newest.clone()
    total = torch.zeros_like(newest, dtype=torch.float32)
    for weight, tensor in zip(_lagrange(list(samples), noise), samples.values(), strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total.to(newest.dtype)


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
