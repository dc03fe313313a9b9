"""Session: dense and every preset side by side, round by round, on one loaded pipeline; resumable after every clip."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

from dit_accel import accelerate
from dit_accel.bench.dense_kernels import using
from dit_accel.bench.gains import NOT_FINITE, STRICT
from dit_accel.bench.profile import break_down, profile
from dit_accel.bench.ran import add_up, ran_of
from dit_accel.bench.results import Clip, Kind, MadeClip, Memory, Ran, Results, Run, Variant
from dit_accel.bench.stopwatch import seconds_of
from dit_accel.bench.store import Store
from dit_accel.errors import FallbackError, NotFiniteError
from dit_accel.handle import Handle
from dit_accel.preset import Preset
from dit_accel.quality.against import measure_quality
from dit_accel.quality.perceptual import Lpips

Generate = Callable[[int, Clip], np.ndarray]  # steps and a clip to uint8 [F, H, W, 3]
Guard = Callable[[Handle | None], contextlib.AbstractContextManager]
NO_GPU = "PyTorch counts memory on a GPU only"


@dataclass(frozen=True)
class Subject:
    """One thing to be measured."""

    name: str
    kind: Kind
    preset: Preset | None  # None: stock
    steps: int
    kernels: Sequence[str]  # of dense attention, the one to be used first
    about: str
    of: str | None = None


@dataclass
class Session:
    """Measures subjects, and writes results.json after every clip.

    Args:
        pipe: a loaded pipeline, stock between two runs.
        generate: makes a clip with so many steps.
        store: takes what was measured.
        results: what was measured so far.
        guard: explains an out-of-memory error; takes what is installed.
        lpips: what `open_lpips` gave.
        tick: told of what comes next, and of everything done.
    """

    pipe: Any
    generate: Generate
    store: Store
    results: Results
    guard: Guard
    lpips: Lpips | str
    tick: Callable[[str, bool], None]

    def measure_rounds(self, subjects: Sequence[Subject], rounds: int) -> None:
        """Every subject once in each round, in turns, all with the round's clip. What is there is not made again."""
        warm: set[str] = set()
        for number in range(rounds):
            clip = number % len(self.results.clips)
            for subject in subjects:
                if self._is_done(subject, number, clip):
                    continue
                if subject.name not in warm:
                    self._warm_up(subject, clip)
                    warm.add(subject.name)
                if not self._failed(subject.name):
                    self._run(subject, number, clip)

    def measure_parts(self, subject: Subject) -> None:
        """Where a subject's time goes, in a run of its own; nothing if that is known, or it failed."""
        variant = self._variant(subject)
        if variant.breakdown is not None or variant.seconds is None or self._failed(subject.name):
            return
        self.tick(f"{subject.name}, with clocks", False)
        with using(subject.kernels), self.guard(None):
            seen = profile(
                self.pipe,
                subject.preset,
                lambda: self.generate(subject.steps, self.results.clips[0]),
            )
        self._change(replace(variant, breakdown=break_down(seen, variant.seconds)))
        self.store.write(self.results)
        self.tick("", True)

    def _warm_up(self, subject: Subject, clip: int) -> None:
        """A generation that is not counted: whole on a GPU, where kernels are compiled and tuned, else of two steps."""
        steps = subject.steps if self.pipe._execution_device.type == "cuda" else min(2, subject.steps)
        self.tick(f"{subject.name}, warming up", False)
        try:
            seconds, _, _ = self._make(subject, steps, clip)
        except (NotFiniteError, FallbackError) as error:
            self._note_failure(subject, clip, error)
            return
        variant = self._variant(subject)
        if not variant.runs:
            self._change(replace(variant, warm_up_seconds=seconds))

    def _run(self, subject: Subject, number: int, clip: int) -> None:
        self.tick(subject.name, False)
        device = self.pipe._execution_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            seconds, frames, ran = self._make(subject, subject.steps, clip)
        except (NotFiniteError, FallbackError) as error:
            self._note_failure(subject, clip, error)
            return
        variant = self._variant(subject)
        runs = (*variant.runs, Run(number, clip, seconds))
        variant = replace(
            variant,
            runs=runs,
            seconds=median(run.seconds for run in runs),
            quartiles=_quartiles([run.seconds for run in runs]),
            memory=_most(variant.memory, device),
            ran=None if ran is None else add_up(variant.ran, ran),
        )
        if any(made.clip == clip for made in variant.clips):  # the same seed gives the same clip
            self._change(variant)
            self.store.write(self.results)
        else:
            self._keep_clip(variant, clip, frames)
        self.tick("", True)

    def _make(self, subject: Subject, steps: int, clip: int) -> tuple[float, np.ndarray, Ran | None]:
        """Seconds, frames and what ran of one generation. Installing and removing is not in the seconds."""
        made: list[np.ndarray] = []
        asked = self.results.clips[clip]
        with contextlib.ExitStack() as stack:
            stack.enter_context(using(subject.kernels))
            handle = None if subject.preset is None else stack.enter_context(accelerate(self.pipe, subject.preset))
            stack.enter_context(self.guard(handle))
            seconds = seconds_of(lambda: made.append(self.generate(steps, asked)), self.pipe._execution_device)
            ran = None if handle is None else ran_of(handle.report(), handle.decisions())
        return seconds, made[0], ran

    def _keep_clip(self, variant: Variant, clip: int, frames: np.ndarray) -> None:
        """Write a clip that was made for the first time, and its distance from dense."""
        store, files = self.store, (self.store.name(variant.name, clip),)
        clips = {files[0]: frames}
        quality, worst = None, ()
        if variant.kind != "dense":
            dense = store.dense_frames(clip)
            quality = measure_quality(frames, dense, self.lpips)
            worst = tuple(store.name(variant.name, clip, what, ".png") for what in ("-worst", "-worst-dense"))
            place = slice(quality.worst_frame, quality.worst_frame + 1)
            clips |= dict(zip(worst, (frames[place], dense[place]), strict=True))
        made = MadeClip(clip=clip, files=files, worst_frame_files=worst, problem=None, quality=quality)
        self._change(replace(variant, clips=(*variant.clips, made)))
        store.write(self.results, clips, (clip, frames) if variant.kind == "dense" else None)

    def _note_failure(self, subject: Subject, clip: int, error: Exception) -> None:
        """Note why a subject is not measured any further."""
        what = STRICT if isinstance(error, FallbackError) else NOT_FINITE
        made = MadeClip(clip=clip, files=(), worst_frame_files=(), problem=f"{what}: {error}", quality=None)
        variant = self._variant(subject)
        self._change(replace(variant, clips=(*variant.clips, made)))
        self.store.write(self.results)

    def _is_done(self, subject: Subject, number: int, clip: int) -> bool:
        if self._failed(subject.name) or self._failed("dense"):
            return True
        variant = self._variant(subject)
        return any(run.round == number for run in variant.runs)

    def _failed(self, name: str) -> bool:
        found = [variant for variant in self.results.variants if variant.name == name]
        return any(made.problem for variant in found for made in variant.clips)

    def _variant(self, subject: Subject) -> Variant:
        """What is known of a subject, which joins the results here if it is new."""
        with contextlib.suppress(KeyError):
            return self.results.variant(subject.name)
        gpu = self.pipe._execution_device.type == "cuda"
        new = Variant(
            name=subject.name,
            kind=subject.kind,
            about=subject.about,
            of=subject.of,
            steps=subject.steps,
            warm_up_seconds=0.0,
            runs=(),
            seconds=None,
            quartiles=None,
            breakdown=None,
            memory=Memory(None, None, None if gpu else NO_GPU),
            ran=None,
            clips=(),
        )
        self.results = replace(self.results, variants=(*self.results.variants, new))
        return new

    def _change(self, variant: Variant) -> None:
        others = self.results.variants
        changed = tuple(variant if other.name == variant.name else other for other in others)
        self.results = replace(self.results, variants=changed)


def _quartiles(seconds: list[float]) -> tuple[float, float]:
    if len(seconds) == 1:
        return seconds[0], seconds[0]
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return low, high


def _most(before: Memory, device: torch.device) -> Memory:
    """The peaks of this run, where they are above those before."""
    if device.type != "cuda":
        return before
    now = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return Memory(max(before.peak_allocated or 0, now[0]), max(before.peak_reserved or 0, now[1]), None)
