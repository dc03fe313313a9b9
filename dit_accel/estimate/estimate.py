"""Estimate: what a preset should gain at a size on a GPU, and what it needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import mean
from typing import Any

from dit_accel.errors import UsageError
from dit_accel.estimate.architectures import find_architecture
from dit_accel.estimate.count import count_forward
from dit_accel.estimate.gpus import MEASURED, Gpu, find_gpu
from dit_accel.estimate.memory import (
    Memory,
    activation_bytes,
    cache_bytes,
    plan_bytes,
    region_bytes,
    weight_bytes,
)
from dit_accel.estimate.notes import NOT_ESTIMATED, notes_on
from dit_accel.estimate.run_plan import RunPlan, break_even
from dit_accel.estimate.steps import reusable_steps, scheduled_reuse
from dit_accel.estimate.timing import Times
from dit_accel.preset import Preset

DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Estimate:
    """What a preset should gain. Seconds are the transformer's in one generation, milliseconds those of one forward."""

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
        gpu = self.gpu
        told["gpu"] = {"key": gpu.key, "name": gpu.name, "rates": gpu.how, "memory_gb": gpu.memory_gb}
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
    plan = RunPlan(preset, model, grid, work, gpu, keep)
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
        break_even_tokens=break_even(preset, model, grid, work, gpu, keep),
        memory=Memory(
            weights=model.transformers * weight_bytes(work),
            activations=activation_bytes(model, work),
            plans=0 if preset.sparse is None else plan_bytes(preset.sparse, work, plan.calls, branches),
            cache=0 if preset.cache is None else cache_bytes(preset.cache, model, work, branches),
            region=0 if region is None else region_bytes(region, work, branches),
        ),
        notes=tuple(notes_on(preset, model, plan, most, reused)),
    )


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
