"""Run plan: what each step of a run computes and how long that takes, and from what size on it pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from dit_accel.estimate.architectures import Published
from dit_accel.estimate.count import Work, count_forward
from dit_accel.estimate.gpus import Gpu
from dit_accel.estimate.keeping import sparse_call
from dit_accel.estimate.steps import layer_keeps, noise_levels
from dit_accel.estimate.timing import Sparse, Times, dense_ms, forward_times, region_times
from dit_accel.preset import Preset
from dit_accel.region.options import Region
from dit_accel.region.steps import count_active, whole_steps

_PAYS = 1.05  # a gain below this is within what estimates are off by
_MIDDLE = 0.5  # a noise level at which presets are sparse
_SIDES = [n / 16 for n in (*range(1, 16), *range(16, 49, 2))]  # of the size asked for, to look for the break-even at


class Calls:
    """The sparse calls of a preset on a grid, each share's worked out once.

    Args:
        work: of a forward over all tokens.
        keep: what is reckoned with where the method says nothing.
    """

    def __init__(
        self, preset: Preset, model: Published, grid: tuple[int, int, int], work: Work, keep: float | None
    ) -> None:
        self.preset, self.grid, self.work, self.keep = preset, grid, work, keep
        self.text = (model.valid or model.text) if work.text else 0
        self.known: dict[float, tuple[Sparse, float]] = {}

    def at(self, noise: float, step: int = 0, steps: int = 0) -> list[Sparse | None] | None:
        """Each layer's call at a noise level, None where it is dense; None if all are."""
        keeps = layer_keeps(self.preset.sparse, noise, self.work.layers, step=step, steps=steps)
        return None if keeps is None else [None if keep is None else self._call(keep) for keep in keeps]

    def _call(self, keep: float) -> Sparse:
        if keep not in self.known:
            given = self.keep if math.isnan(keep) else keep
            self.known[keep] = sparse_call(self.preset.sparse, given, self.grid, self.text)
        return self.known[keep][0]


class RunPlan:
    """The steps of a run: what each computes, and how long that takes."""

    def __init__(
        self,
        preset: Preset,
        model: Published,
        grid: tuple[int, int, int],
        work: Work,
        gpu: Gpu,
        keep: float | None,
    ) -> None:
        self.preset, self.model, self.work, self.gpu = preset, model, work, gpu
        calls = Calls(preset, model, grid, work, keep)
        self.layers = _layers_of(preset, model, work, calls)
        self.dense = forward_times(work, gpu, [None] * work.layers)
        self.steps = [self.dense if layers is None else forward_times(work, gpu, layers) for layers in self.layers]
        sparse = [n for n, layers in enumerate(self.layers) if layers is not None]
        self.fast = self.steps[sparse[-1]] if sparse else None
        self.calls = [call for call in (self.layers[sparse[-1]] if sparse else ()) if call is not None]
        shares = {id(call): share for call, share in calls.known.values()}
        self.keep = mean(shares[id(call)] for call in self.calls) if self.calls else None
        self.part_ms: float | None = None

    def attention_gain(self) -> float | None:
        """Of the sparse layers' attention, plans included, over dense."""
        if self.fast is None or not self.calls:
            return None
        return dense_ms(self.work, self.gpu) * len(self.calls) / self.fast.sparse_attention

    def with_region(self) -> list[float]:
        """Milliseconds of every step, those shortened that compute a part of the tokens."""
        region = self.preset.region
        if region is None or region.sample_ratio >= 1:
            return [times.total for times in self.steps]
        active = count_active(region, self.work.tokens)
        part = count_forward(self.model, (1, 1, active), batch=self.work.batch)
        whole = whole_steps(region, len(self.steps))
        found = []
        for step, (layers, times) in enumerate(zip(self.layers, self.steps, strict=True)):
            if step in whole:
                found.append(times.total)
                continue
            self.part_ms = self._part(region, part, layers or [None] * self.work.layers).total
            found.append(self.part_ms)
        return found

    def _part(self, region: Region, part: Work, layers: Sequence[Sparse | None]) -> Times:
        if region.keys == "drop":
            return forward_times(part, self.gpu, [None] * part.layers)
        by_blocks = region.unit == "block" and any(layer is not None for layer in layers)
        return region_times(self.work, part, self.gpu, layers, by_blocks=by_blocks)


def _layers_of(
    preset: Preset, model: Published, work: Work, calls: Calls
) -> list[list[Sparse | None] | None]:
    """For each step its layers' sparse calls; None for a dense step."""
    options, steps = preset.sparse, preset.generate.steps
    if options is None or work.tokens < options.least_tokens("cuda"):
        return [None] * steps
    levels = noise_levels(model, steps, preset.generate.flow_shift, work.tokens)
    found = (calls.at(noise, step, steps) for step, noise in enumerate(levels))
    return [layers if layers and any(layers) else None for layers in found]


def break_even(
    preset: Preset, model: Published, grid: tuple[int, int, int], work: Work, gpu: Gpu, keep: float | None
) -> int | None:
    """Tokens of the smallest size in this shape, up to three times its sides, from which on a sparse forward pays.

    None: at no size looked at; 0: at all. Its steps and lower bound of tokens are not asked, as in the records.
    """
    if preset.sparse is None:
        return None
    found: int | None = None
    for side in reversed(_SIDES):
        smaller = grid[0], max(1, round(grid[1] * side)), max(1, round(grid[2] * side))
        scaled = count_forward(model, smaller, batch=work.batch)
        calls = Calls(preset, model, smaller, scaled, keep)
        layers = calls.at(_MIDDLE)
        if layers is None or not any(layers):
            return None
        dense = forward_times(scaled, gpu, [None] * work.layers)
        if dense.total < _PAYS * forward_times(scaled, gpu, layers).total:
            return found
        found = scaled.tokens
    return 0
