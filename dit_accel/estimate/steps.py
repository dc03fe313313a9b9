"""Steps: what each step of a run computes, from its noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dit_accel.caches import Cache
from dit_accel.caches.schedule import parse_schedule
from dit_accel.estimate.architectures import SD3, WAN, Published
from dit_accel.options import SparseOptions

_TIMESTEPS = 1000  # of training
# FLUX.1 dev's shift grows with the image: exp(0.5) at 256 tokens, exp(1.15) at 4,096, along a line in the exponent.
_SHIFT_TOKENS, _SHIFTS = (256, 4096), (0.5, 1.15)


def noise_levels(model: Published, steps: int, flow_shift: float | None, tokens: int) -> list[float]:
    """The noise level of every step, from 1 down, as each pipeline's own scheduler has them.

    Args:
        flow_shift: the preset's; none: the model's own.
        tokens: of the image, for a model whose shift goes by its size.
    """
    shift = model.flow_shift if flow_shift is None else flow_shift
    if shift is None:
        slope = (_SHIFTS[1] - _SHIFTS[0]) / (_SHIFT_TOKENS[1] - _SHIFT_TOKENS[0])
        shift = math.exp(_SHIFTS[0] + slope * (tokens - _SHIFT_TOKENS[0]))

    def shifted(t: float) -> float:
        return shift * t / (1 + (shift - 1) * t)

    if model.transformer == WAN:  # UniPC keeps away from 1, and its timesteps are whole numbers
        levels = (min(1 - 1e-6, shifted(1 - (1 - 1 / _TIMESTEPS) * step / steps)) for step in range(steps))
        return [math.floor(_TIMESTEPS * level) / _TIMESTEPS for level in levels]
    if model.transformer == SD3 and steps > 1:  # its last step is at the noise of one training step, shifted twice
        last = shifted(1 / _TIMESTEPS)
        return [shifted(1 - (1 - last) * step / (steps - 1)) for step in range(steps)]
    return [shifted(1 - step / steps) for step in range(steps)]


def layer_keeps(
    options: SparseOptions, noise: float, n_layers: int, *, step: int = 0, steps: int = 0
) -> list[float | None] | None:
    """What each layer keeps at a noise level; None for a layer that is dense there, None for all if all are.

    As the engine and its planner decide it: noise and the first steps, then the dense layers, then the last rule that
    holds.

    Args:
        step: the step of the run, from 0, of so many `steps`, for `dense_first`.

    Returns:
        shares; NaN where the method alone says what is kept.
    """
    if noise > options.dense_above or noise < options.dense_below or step < options.n_dense_first(steps):
        return None
    dense = {layer % n_layers for layer in options.dense_layers}
    keeps: list[float | None] = []
    for layer in range(n_layers):
        held = [rule for rule in options.rules if rule.holds(noise, layer, n_layers)]
        if layer in dense or (held and held[-1].dense):
            keeps.append(None)
            continue
        values: dict = {"keep": options.keep}
        for rule in held:
            values |= rule.values
        keeps.append(math.nan if values["keep"] is None else values["keep"])
    return keeps


def reusable_steps(cache: Cache, steps: int) -> int:
    """The most steps that a cache may make up: those behind its warm-up, as far as it is allowed."""
    if steps < cache.min_steps or cache.dry_run:
        return 0
    most = max(0, steps - cache.warmup)
    return most if cache.max_reused is None else min(most, cache.max_reused)


def scheduled_reuse(cache: Cache, steps: int) -> float | None:
    """Steps that a cache's own schedule reuses, over the branches on average; None where it judges by itself."""
    if cache.schedule is None:
        return None
    plans: Sequence[str] = list(parse_schedule(cache.schedule).values())
    return sum(plan[:steps].count("0") for plan in plans) / len(plans)
