"""The working half of `bench`: load once, look at the model, measure. torch comes in here."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel.bench.dense_kernels import rank_kernels
from dit_accel.bench.measure import count_generations, measure
from dit_accel.bench.profile import Seen, profile
from dit_accel.bench.results import Clip, Results, Workload
from dit_accel.bench.session import Session
from dit_accel.bench.store import Store, clear_folder
from dit_accel.bench.workload import check_same, describe_workload
from dit_accel.cli.bench import Asked
from dit_accel.cli.environment import describe_environment, identify
from dit_accel.cli.making import announce, load, picture_for
from dit_accel.cli.run import told_of_memory
from dit_accel.cli.terminal import remark
from dit_accel.cli.versions import machine
from dit_accel.presets import shipped_models
from dit_accel.quality.page import write_page
from dit_accel.quality.page.drawing import check_drawable
from dit_accel.quality.perceptual import open_lpips

OWN_PROMPTS = 4  # of a shipped model, where none are given
_PROBE_STEPS = 2


def run(
    asked: Asked, model_folder: Path, earlier: Results | None, *, resume: bool, quiet: bool, verbose: bool
) -> tuple[Results, Path]:
    """Measure, and write the report.

    Args:
        earlier: what lies in the folder: continued with `resume`, else replaced.

    Returns:
        The results and the page.
    """
    check_drawable()
    request = asked.request
    numbers = ", ".join(map(str, asked.seeds))
    announce(request, quiet=quiet, verbose=verbose, seeds=f"seed{'s' * (len(asked.seeds) > 1)} {numbers}")
    generate = _generator(asked, model_folder, quiet)
    pipe = generate.pipe
    clips = tuple(Clip(prompt, seed) for prompt in _prompts(asked) for seed in asked.seeds)
    with _bar(asked, len(clips), quiet) as tick:
        tick("looking at model and machine", False)
        with told_of_memory(request):
            seen = profile(pipe, None, lambda: generate(_PROBE_STEPS, clips[0]))
        work = _workload(asked, pipe, seen, clips)
        if earlier is not None and resume:
            check_same(earlier, work, identify(pipe._execution_device))
            results = replace(earlier, complete=False)
        else:
            results = _begin(pipe, work, seen, clips)
            if earlier is not None:
                clear_folder(asked.folder, earlier)
        session = Session(
            pipe=pipe,
            generate=generate,
            store=Store(asked.folder, request.preset.generate.fps, ".png" if _is_image(asked) else ".mp4"),
            results=results,
            guard=lambda handle: told_of_memory(request, handle),
            lpips=open_lpips(),
            tick=tick,
        )
        try:
            results = measure(session, asked.presets, results.environment.dense_kernels)
        except BaseException:
            if any(variant.runs for variant in session.results.variants):
                remark(f"what was measured is in {asked.folder}; --resume goes on from there", quiet=quiet)
            raise
    return results, write_page(results, asked.folder)


class _Generator:
    """Makes a clip of the workload with so many steps."""

    def __init__(self, asked: Asked, pipe: Any, picture: Any) -> None:
        self.pipe, self._request = pipe, asked.request
        self._begins = {} if picture is None else {"image": picture}

    def __call__(self, steps: int, clip: Clip) -> np.ndarray:
        options = replace(self._request.preset.generate, steps=steps)
        return self._request.recipe.generate(self.pipe, options, clip.prompt, seed=clip.seed, **self._begins)


def _generator(asked: Asked, model_folder: Path, quiet: bool) -> _Generator:
    picture = picture_for(asked.request, quiet=quiet)
    return _Generator(asked, load(asked.request, model_folder), picture)


def _workload(asked: Asked, pipe: Any, seen: Seen, clips: tuple[Clip, ...]) -> Workload:
    request, found = asked.request, machine(pipe)
    shipped = "trained" if request.preset.model in shipped_models() else "unknown"
    return describe_workload(
        pipe,
        asked.presets,
        seen,
        _PROBE_STEPS,
        settings=asked.settings,
        weights="random" if asked.random_weights else shipped,
        makes=request.recipe.MAKES,
        dtype=found["dtype"],
        device=found["device"],
        offload=request.machine["offload"],
        prompts=tuple(dict.fromkeys(clip.prompt for clip in clips)),
        seeds=asked.seeds,
        image=None if request.image is None else str(request.image),
        rounds=asked.rounds,
        fewer_steps=asked.fewer_steps,
    )


def _begin(pipe: Any, work: Workload, seen: Seen, clips: tuple[Clip, ...]) -> Results:
    """Results without a run."""
    kernels = rank_kernels(seen.shape, _dtype(pipe), pipe._execution_device)
    environment = describe_environment(pipe._execution_device)
    return Results(
        command=shlex.join(["dit-accel", *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        complete=False,
        environment=replace(environment, dense_kernels=kernels),
        workload=work,
        clips=clips,
        variants=(),
    )


def _prompts(asked: Asked) -> tuple[str, ...]:
    """Those given, or held-out ones of a shipped model."""
    if asked.request.prompts:
        return tuple(dict.fromkeys(asked.request.prompts))
    from dit_accel.quality.prompt_accuracy import held_out_prompts, held_out_still_prompts

    draw = held_out_still_prompts if _is_image(asked) else held_out_prompts
    return tuple(prompt.text for prompt in draw(OWN_PROMPTS))


def _is_image(asked: Asked) -> bool:
    return asked.request.recipe.MAKES == "image"


def _dtype(pipe: Any) -> torch.dtype:
    return (pipe.transformer or pipe.transformer_2).dtype


@contextlib.contextmanager
def _bar(asked: Asked, clips: int, quiet: bool) -> Iterator[Callable[[str, bool], None]]:
    """Progress on stderr, by generations; nothing where nobody watches."""
    from tqdm import tqdm

    with tqdm(
        total=count_generations(len(asked.presets), clips, asked.rounds, asked.fewer_steps),
        unit="run",
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:

        def tick(title: str, done: bool) -> None:
            if title:
                bar.set_description(title)
            bar.update(int(done))

        yield tick
