"""Runs of `bench_methods.py`: clips and their figures, recall, and what the parts of a run take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
from _quality_record import summarise
from evaluate_quality import Variant, run_batch, submit_clip

import dit_accel
from dit_accel.arrangement import Arrangement
from dit_accel.layout import TokenLayout, build_layout
from dit_accel.methods import Method
from dit_accel.options import SparseOptions
from dit_accel.quality.prompt_accuracy import Prompt
from dit_accel.quality.readings import AttributeMatch


@dataclass
class Bench:
    """What all variants of a run have in common."""

    pipe: Any
    call: dict[str, Any]  # of the pipeline
    grid: tuple[int, int, int]  # frames, rows, columns, in tokens
    steps: int
    prompts: list[Prompt]
    batch: int
    base: dict[str, Any]  # sparse options of every variant
    fit_steps: int
    rows: int
    judges: Executor
    dense: list[np.ndarray] = field(default_factory=list)  # clip of each prompt
    keeps: dict[str, float] = field(default_factory=dict)  # options -> what they were found to keep
    layouts: dict[Arrangement, TokenLayout] = field(default_factory=dict)

    def sparse(self, method: str, options: dict[str, Any]) -> SparseOptions:
        return SparseOptions.from_mapping({"method": method, **self.base, **options})

    def arrange(self, sparse: SparseOptions) -> tuple[Method, Arrangement, TokenLayout]:
        """The method object that some options stand for, and the layout it will get."""
        with dit_accel.accelerate(self.pipe, sparse):
            engine = engine_of(self.pipe)
        made_for = engine.layouts.arrangement
        if made_for not in self.layouts:
            layout = build_layout(self.grid, made_for.order, made_for.block, tile=made_for.tile)
            self.layouts[made_for] = layout
        return engine.method, made_for, self.layouts[made_for]


class Stopwatch:
    """What parts of a run take: CUDA events on a GPU, else the clock. A part inside another counts as itself only."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: list[tuple[str, str | None, Any, Any]] = []  # part, the part around it, begin, end
        self.open: list[str] = []

    def timed(self, part: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            self.open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.open.pop()
                self.marks.append((part, self.open[-1] if self.open else None, begin, self._now()))

        return run

    def seconds(self) -> dict[str, float]:
        """Seconds of each part; waits for the device."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for part, around, begin, end in self.marks:
            took = begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
            total[part] = total.get(part, 0.0) + took
            if around is not None:
                total[around] = total.get(around, 0.0) - took
        return total

    def _now(self) -> Any:
        import torch

        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def run_random(bench: Bench, name: str, sparse: SparseOptions) -> dict:
    """Figures of the clips of a control. What its parts take says nothing: blocks are drawn on the CPU."""
    return measure(bench, Variant(name, sparse, bench.steps, None))


def run_sparse(bench: Bench, name: str, sparse: SparseOptions, whole_run: bool = False) -> dict:
    """Everything about a sparse variant: figures of clips, recall, keep by step, and what its parts take.

    Parts are timed in the few steps that also served to find options, or in a run of all of them.
    """
    told: dict[str, Any] = {}

    def watch_meanwhile() -> None:
        told.update(watch(bench, sparse))

    told |= measure(bench, Variant(name, sparse, bench.steps, None), watch_meanwhile)
    return {**told, "parts": time_parts(bench, sparse, bench.steps if whole_run else bench.fit_steps)}


def measure(bench: Bench, variant: Variant, meanwhile: Callable[[], None] = lambda: None) -> dict:
    """Generate every prompt, judge the clips and compare them with dense ones of the same noise.

    Args:
        meanwhile: called while the clips are judged; nothing in it should be timed.
    """
    pipe, batches = bench.pipe, range(0, len(bench.prompts), bench.batch)
    is_dense = variant.name == "dense"  # what runs first
    if pipe.device.type == "cuda" or is_dense:  # compile and warm up outside the timing
        run_batch(pipe, variant, bench.prompts[: bench.batch], {**bench.call, "num_inference_steps": 2})
    calls, made = [], []
    for start in batches:
        batch = bench.prompts[start : start + bench.batch]
        clips, seconds, denoise, ran = run_batch(pipe, variant, batch, bench.call)
        calls.append(ran)
        cost = {"seconds": seconds / len(batch), "denoise_seconds": denoise / len(batch)}
        made += [(prompt, clip, cost) for prompt, clip in zip(batch, clips, strict=True)]
    if is_dense:
        bench.dense = [clip for _, clip, _ in made]
    # Judges would share the cores with what is timed: they begin when all of it has been.
    rows = [
        submit_clip(bench.judges, pipe.device, prompt, clip, None if is_dense else dense, cost)
        for (prompt, clip, cost), dense in zip(made, bench.dense, strict=True)
    ]
    meanwhile()
    found = [row.result() for row in rows]
    frames = len(bench.dense[0])
    one = {"variants": ["it"], "frames": frames, "rows": {"it": found}, "calls": {"it": calls}}
    told = {"options": variant.sparse and variant.sparse.to_mapping(), "figures": summarise(one)["it"]}
    if not is_dense:
        told["psnr"] = [_rounded(row["compared"]["psnr"]) for row in found]
    return {**told, "right": [AttributeMatch(**row["match"]).everything for row in found]}


def watch(bench: Bench, sparse: SparseOptions) -> dict:
    """One run of two prompts: recall in a few calls, what each step keeps, and how plans were come by."""
    from dit_accel.quality.recall import Recorder

    layers = {0, engine_layers(bench.pipe) // 2, engine_layers(bench.pipe) - 1}
    steps = {bench.steps * n // 4 for n in (1, 2, 3)} | {bench.steps - 1}
    recorder = Recorder(bench.rows, lambda call: call.layer in layers and call.step in steps)
    report = watch_run(bench, sparse, bench.prompts[:2], bench.steps, lambda handle: handle.observe(recorder))
    seen = [one for one in recorder.seen if one.recall is not None]
    recall = {"recall": None, "keep": None, "calls": len(seen), "rows": bench.rows}
    if seen:
        recall["recall"] = round(mean(share for one in seen for share in one.recall), 5)
        recall["keep"] = round(mean(share for one in seen for share in one.keep), 5)  # of these calls
    by_step = {step: round(keep, 5) for step, keep in report.keep_per_step.items()}
    return {"recall": recall, "keep_per_step": by_step, "plans": dict(report.plans)}


def time_parts(bench: Bench, sparse: SparseOptions, n_steps: int) -> dict:
    """Milliseconds a sparse step and prompt for predicting, reordering and attending, in a run of its own."""
    from dit_accel.hooks import Reorder
    from dit_accel.kernels import reorder

    watch = Stopwatch(bench.pipe.device.type == "cuda")
    batch = bench.prompts[: bench.batch]

    def install(handle: Any) -> None:
        engine = engine_of(bench.pipe)
        planner = engine.planner
        planner.plan = watch.timed("predict", planner.plan)
        if planner.learns:
            found = planner.method_at
            planner.method_at = lambda call: _Learner(found(call), watch)
        attend = engine.attend

        def attend_timed(*args: Any, **kwargs: Any) -> Any:
            before = len(watch.marks)
            out = watch.timed("attend", attend)(*args, **kwargs)
            if not any(mark[0] == "predict" for mark in watch.marks[before:]):
                del watch.marks[before:]  # a dense call
            return out

        engine.attend = attend_timed

    with contextlib.ExitStack() as stack:
        # both kinds of reordering: of a forward's tokens, and head by head inside a call
        stack.enter_context(patch.object(Reorder, "__call__", watch.timed("reorder", Reorder.__call__)))
        for name in ("take_rows", "put_rows"):
            stack.enter_context(patch.object(reorder, name, watch.timed("reorder", getattr(reorder, name))))
        report = watch_run(bench, sparse, batch, n_steps, install)
    steps = max(len(report.keep_per_step), 1)
    return {part: round(1e3 * seconds / steps / len(batch), 4) for part, seconds in watch.seconds().items()}


class _Learner:
    """A method whose learning counts as prediction: it makes the next step's plan."""

    def __init__(self, method: Any, watch: Stopwatch) -> None:
        self._method, self.learn = method, watch.timed("predict", method.learn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)


def watch_run(
    bench: Bench, sparse: SparseOptions, batch: list[Prompt], steps: int, install: Callable[[Any], None]
) -> Any:
    """Denoise a batch with something installed on the handle, decode nothing, and return the report."""
    import torch

    with dit_accel.accelerate(bench.pipe, sparse) as handle:
        install(handle)
        bench.pipe(
            prompt=[prompt.text for prompt in batch],
            generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in batch],
            output_type="latent",
            **{**bench.call, "num_inference_steps": steps},
        )
        return handle.report()


def engine_of(pipe: Any) -> Any:
    """The engine that a handle put on a pipeline of one transformer."""
    return pipe.transformer.blocks[0].attn1.processor.engine


def engine_layers(pipe: Any) -> int:
    return len(pipe.transformer.blocks)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
