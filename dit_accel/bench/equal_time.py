"""Fewer steps at equal time: the rival that every accelerator has for nothing. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from dit_accel.bench.results import Breakdown, EqualTime, Variant, mean_psnr


def at_cost(fewer: list[tuple[float, float]], cost: float) -> float | None:
    """PSNR of fewer steps at a cost, on the line between its neighbours; None outside of what was run.

    Args:
        fewer: (cost, PSNR in dB) of what was run, in the order of cost.
    """
    if len(fewer) == 1 and fewer[0][0] == cost:
        return fewer[0][1]
    for (low, below), (high, above) in pairwise(fewer):
        if low <= cost <= high:
            return below + (above - below) * (cost - low) / (high - low) if high > low else max(below, above)
    return None


def steps_in(seconds: float, dense: float, breakdown: Breakdown, steps: int) -> float:
    """How many dense steps, not a whole number, take so many seconds.

    Text encoding and decoding take the same time whatever the steps are, all else grows with them.

    Args:
        seconds: of the whole generation that is to be met.
        dense: seconds of a dense generation of `steps` steps.
        breakdown: of that one.
    """
    fixed = (breakdown.text_encoder + breakdown.vae_decode) / breakdown.total * dense
    return (seconds - fixed) / (dense - fixed) * steps


def neighbours(steps: float, most: int) -> tuple[int, int]:
    """The whole numbers of steps below and above, from 1 to one less than dense has; equal at either end."""
    least, last = 1, most - 1
    below = min(max(math.floor(steps), least), last)
    return below, min(max(math.ceil(steps), below), last)


def compare_at_equal_time(preset: Variant, steps: float, fewer: Mapping[int, Variant]) -> EqualTime | None:
    """What dense with fewer steps reaches in a preset's time; None where that lies outside of what was run.

    Args:
        steps: dense steps that take as long as the preset, as `steps_in` says. Beyond one step or all but one it is
            the end that is compared.
        fewer: what was run with fewer steps, by their number.
    """
    counts = sorted(fewer)
    place = min(max(steps, 1.0), preset.steps - 1.0)
    below = max((count for count in counts if count <= place), default=None)
    above = min((count for count in counts if count >= place), default=None)
    if below is None or above is None:
        return None
    found = [(float(count), mean_psnr(fewer[count])) for count in dict.fromkeys((below, above))]
    known = [(count, psnr) for count, psnr in found if psnr is not None]
    return EqualTime(
        preset=preset.name,
        steps=place,
        below=fewer[below].name,
        above=fewer[above].name,
        psnr_db=at_cost(known, place) if len(known) == len(found) else None,
        preset_psnr_db=mean_psnr(preset),
    )
