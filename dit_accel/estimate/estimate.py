"""Estimate: what a preset should gain at a size on a GPU, and what it needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from dit_accel.errors import UsageError
from dit_accel.estimate.architectures import Published, find_architecture
from dit_accel.estimate.count import Work, count_forward
from dit_accel.estimate.gpus import MEASURED, Gpu, find_gpu, nearest_head
from dit_accel.estimate.keeping import sparse_call
from dit_accel.estimate.memory import (
    Memory,
    activation_bytes,
    cache_bytes,
    plan_bytes,
    region_bytes,
    weight_bytes,
)
from dit_accel.estimate.steps import layer_keeps, noise_levels, reusable_steps, scheduled_reuse
from dit_accel.estimate.timing import Sparse, Times, dense_ms, forward_times, region_times
from dit_accel.options import SparseOptions
from dit_accel.preset import Preset
from dit_accel.region.options import Region
from dit_accel.region.steps import count_active, whole_steps

DTYPES = ("bfloat16", "float16")
NOT_ESTIMATED = ("text encoders", "autoencoder")
# dense where a preset says no number: as dit_accel.engine has it for a GPU
LEAST_TOKENS = 8192
_SMALL = 1024  # channels; every model that was measured is wider
_PAYS = 1.05  # a gain below this is within what estimates are off by
_MIDDLE = 0.5  # a noise level at which presets are sparse
_SIDES = [n / 16 for n in (*range(1, 16), *range(16, 49, 2))]  # of the size asked for, to look for the break-even at


@dataclass(frozen=True)
class Estimate:
    """What a preset should gain. Seconds are those of the transformer in one generation, milliseconds of one forward."""

    preset: str
    model: str
    architecture: str  # where its configuration comes from
    gpu: Gpu
    dtype: str
    size: tuple[int, int, int]  # width and height in pixels, and frames
    grid: tuple[int, int, int]  # frames, rows and columns of tokens
    tokens: int  # of video or image
    text: int  # tokens, padding included
    steps: int
    forwards_a_step: int
    batch: int  # rows of a forward
    flops: dict[str, int]  # of a dense forward, by part
    dense: Times  # of a dense forward
    fast: Times | None  # of a forward in a sparse step; None: no step is sparse
    keep: float | None  # of that step's sparse calls: share of all keys that is read
    attention_gain: float | None  # of one sparse call over a dense one
    sparse_steps: int
    region_steps: int  # that compute a part of the tokens
    region_ms: float | None  # of a forward in such a step
    reused_steps: float  # that the cache makes up, as given or as its schedule says
    reusable_steps: int | None  # the most that it may make up; None: no cache
    reused_step_seconds: float | None  # that one of them saves
    dense_seconds: float
    fast_seconds: float
    sparse_gain: float  # of a whole generation with sparse attention alone
    region_gain: float  # what region sampling adds to it, as a factor
    cache_gain: float  # what the reused steps add, as a factor
    break_even_tokens: int | None  # from where on a sparse forward gains 5 %; 0: at every size looked at
    memory: Memory
    notes: tuple[str, ...]

    @property
    def gain(self) -> float:
        """Of a whole generation."""
        return self.dense_seconds / self.fast_seconds

    @property
    def forward_gain(self) -> float | None:
        """Of a forward in a sparse step."""
        return None if self.fast is None else self.dense.total / self.fast.total

    @property
    def fits(self) -> bool:
        """Whether all transformers and a forward have room in the GPU's memory."""
        return self.memory.total <= self.gpu.memory_gb * 1e9

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        told = dataclasses.asdict(self)
        told["gpu"] = {"key": self.gpu.key, "name": self.gpu.name, "rates": self.gpu.how, "memory_gb": self.gpu.memory_gb}
        for name in ("dense", "fast"):
            times = getattr(self, name)
            if times is not None:
                told[name] |= {"total": times.total, "attention_share": times.attention_share}
        told["memory"]["total"] = self.memory.total
        return told | {
            "gain": self.gain, "forward_gain": self.forward_gain, "fits": self.fits,
            "not_estimated": list(NOT_ESTIMATED),
        }  # fmt: skip


def estimate(
    preset: Preset,
    gpu: Gpu | None = None,
    *,
    dtype: str = "bfloat16",
    keep: float | None = None,
    reused: int | None = None,
) -> Estimate:
    """What a preset should gain at its size. Imports no torch, and reads no weights.

    Args:
        gpu: none: the one whose rates were measured.
        dtype: bfloat16 or float16.
        keep: share of the key blocks to reckon with, for a method that says none beforehand.
        reused: steps that the preset's cache makes up, as the record of a like run has it; none: what its schedule
            says, and no step where it judges by itself.

    Raises:
        UsageError: a size that the model cannot make, a model that is in no table, a method whose share is not known
            before a run, another dtype, more reused steps than there may be.
        EnvironmentProblem: a local model without its config files.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: rates were measured for {DTYPES[0]}, and hold for {' and '.join(DTYPES)}")
    gpu = find_gpu(MEASURED) if gpu is None else gpu
    options = preset.generate
    model = find_architecture(preset.model)
    grid = model.grid(options.width, options.height, options.frames)
    both = model.guided and options.guidance > 1
    batch = 2 if both and model.both_branches else 1
    branches = 2 if both and not model.both_branches else 1
    work = count_forward(model, grid, batch=batch)
    plan = _Plan(preset, model, grid, work, gpu, keep)
    sparse_ms = [times.total for times in plan.steps]
    region_ms = plan.with_region()
    dense_seconds = branches * options.steps * plan.dense.total / 1e3
    sparse_seconds = branches * sum(sparse_ms) / 1e3
    region_seconds = branches * sum(region_ms) / 1e3
    most, made_up = _reuse(preset, reused)
    saved = None
    if most is not None:
        saved = branches * mean(region_ms[preset.cache.warmup :] or region_ms) / 1e3
    fast_seconds = region_seconds - (saved or 0.0) * made_up
    region = preset.region
    return Estimate(
        preset=preset.name,
        model=preset.model,
        architecture=model.origin,
        gpu=gpu,
        dtype=dtype,
        size=(options.width, options.height, options.frames),
        grid=grid,
        tokens=work.tokens,
        text=model.text,
        steps=options.steps,
        forwards_a_step=branches,
        batch=batch,
        flops=work.by_part(),
        dense=plan.dense,
        fast=plan.fast,
        keep=plan.keep,
        attention_gain=plan.attention_gain(),
        sparse_steps=sum(layers is not None for layers in plan.layers),
        region_steps=sum(a != b for a, b in zip(sparse_ms, region_ms, strict=True)) if region else 0,
        region_ms=plan.part_ms,
        reused_steps=made_up,
        reusable_steps=most,
        reused_step_seconds=saved,
        dense_seconds=dense_seconds,
        fast_seconds=fast_seconds,
        sparse_gain=dense_seconds / sparse_seconds,
        region_gain=sparse_seconds / region_seconds,
        cache_gain=region_seconds / fast_seconds,
        break_even_tokens=_break_even(preset, model, grid, work, gpu, keep),
        memory=Memory(
            weights=model.transformers * weight_bytes(model, work),
            activations=activation_bytes(model, work),
            plans=0 if preset.sparse is None else plan_bytes(preset.sparse, work, plan.calls, branches),
            cache=0 if preset.cache is None else cache_bytes(preset.cache, model, work, branches),
            region=0 if region is None else region_bytes(region, work, branches),
        ),
        notes=tuple(_notes(preset, model, plan, most, reused)),
    )


class _Calls:
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

    def at(self, noise: float) -> list[Sparse | None] | None:
        """Each layer's call at a noise level, None where it is dense; None if all are."""
        keeps = layer_keeps(self.preset.sparse, noise, self.work.layers)
        return None if keeps is None else [None if keep is None else self._call(keep) for keep in keeps]

    def _call(self, keep: float) -> Sparse:
        if keep not in self.known:
            given = self.keep if math.isnan(keep) else keep
            self.known[keep] = sparse_call(self.preset.sparse, given, self.grid, self.text)
        return self.known[keep][0]


class _Plan:
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
        calls = _Calls(preset, model, grid, work, keep)
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
    preset: Preset, model: Published, work: Work, calls: _Calls
) -> list[list[Sparse | None] | None]:
    """For each step its layers' sparse calls; None for a dense step."""
    options, steps = preset.sparse, preset.generate.steps
    if options is None or work.tokens < _least(options):
        return [None] * steps
    levels = noise_levels(model, steps, preset.generate.flow_shift, work.tokens)
    found = (calls.at(noise) for noise in levels)
    return [layers if layers and any(layers) else None for layers in found]


def _least(options: SparseOptions) -> int:
    return LEAST_TOKENS if options.min_tokens is None else options.min_tokens


def _reuse(preset: Preset, given: int | None) -> tuple[int | None, float]:
    """The most steps that the cache may make up, and how many are reckoned with."""
    if preset.cache is None:
        if given is not None:
            raise UsageError(f"--reused {given}: preset {preset.name!r} has no cache; leave it out")
        return None, 0.0
    steps = preset.generate.steps
    most = reusable_steps(preset.cache, steps)
    if given is None:
        return most, min(most, scheduled_reuse(preset.cache, steps) or 0.0)
    if not 0 <= given <= most:
        raise UsageError(f"--reused {given}: of {steps} steps this preset's cache makes up 0 to {most}")
    return most, float(given)


def _break_even(
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
        calls = _Calls(preset, model, smaller, scaled, keep)
        layers = calls.at(_MIDDLE)
        if layers is None or not any(layers):
            return None
        dense = forward_times(scaled, gpu, [None] * work.layers)
        if dense.total < _PAYS * forward_times(scaled, gpu, layers).total:
            return found
        found = scaled.tokens
    return 0


def _notes(preset: Preset, model: Published, plan: _Plan, most: int | None, reused: int | None) -> Iterator[str]:
    yield f"not estimated: {' and '.join(NOT_ESTIMATED)}; seconds and memory are those of the transformer"
    if not plan.gpu.measured:
        yield (
            "rates of this GPU are scaled from the H200's by published peaks, not measured; where the Hopper executor "
            "does not run, sparse attention may gain less"
        )
    if preset.sparse is not None:
        yield from _sparse_notes(preset.sparse, plan)
    if any(part is not None and part.roles for part in (preset.sparse, preset.cache, preset.region)):
        yield "options for one transformer alone are left out: both are reckoned with the common ones"
    head = model.config["attention_head_dim"]
    if nearest_head(head) != head:
        yield f"heads of {head} were not measured: rates of heads of {nearest_head(head)}"
    if most and reused is None and preset.cache.schedule is None:
        yield (
            f"the cache judges during the run: no reused step is reckoned with, of at most {most}; give what the report "
            "of a like run says with --reused N"
        )
    if model.width < _SMALL:
        yield (
            "a model so small leaves a GPU waiting for the host, whose time for a plain kernel is in no record: these "
            "times are too short"
        )


def _sparse_notes(options: SparseOptions, plan: _Plan) -> Iterator[str]:
    if plan.fast is None:
        least = _least(options)
        few = plan.work.tokens < least
        why = f"{plan.work.tokens:,} tokens are fewer than its min_tokens, {least:,}" if few else (
            f"at this size every step's noise level is outside {options.dense_below:g} to {options.dense_above:g}"
        )  # fmt: skip
        yield f"no step is sparse: {why}"
    if options.method != "pooled":
        yield f"what method {options.method!r} takes to predict a plan was not measured in a pipeline: pooled's is taken"
    if options.precision != "full":
        yield f"precision {options.precision!r} is reckoned as full: it is in no record of a pipeline"
    if options.top_p is not None:
        yield "top_p may keep more than keep says; that is not in these figures"
