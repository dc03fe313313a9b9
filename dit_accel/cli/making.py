"""What every verb that makes a clip does: announce it, load the pipeline, open a record, time a generation.

torch comes in here.
"""

from __future__ import annotations

import contextlib
import datetime
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.cli.request import Request
from dit_accel.cli.terminal import remark
from dit_accel.cli.versions import machine, versions
from dit_accel.pipelines import wan


def announce(request: Request, *, quiet: bool, verbose: bool) -> None:
    """Say what is about to be made, and silence the libraries unless all is to be heard."""
    if not verbose:
        _hush()
    preset = request.preset
    remark(f"preset {preset.name} · {preset.model} · seed {request.seed}", quiet=quiet)


def load(request: Request, folder: Path) -> Any:
    """The pipeline of a request, from the model's folder."""
    return wan.load(
        str(folder),
        device=request.machine["device"],
        dtype=request.machine["dtype"],
        offload=request.machine["offload"],
        flow_shift=request.preset.generate.flow_shift,
        loras=request.machine["lora"],
    )


def open_record(request: Request, pipe: Any) -> dict[str, Any]:
    """What a record of ours begins with: versions, the command, every value and the machine."""
    return {
        "tool": "dit_accel",
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "command": shlex.join(["dit-accel", *sys.argv[1:]]),
        **request.to_dict(),
        "machine": {**request.machine, **machine(pipe)},
    }


def timed(pipe: Any, request: Request, prompt: str, title: str, quiet: bool) -> tuple[np.ndarray, float]:
    """Frames and the seconds of the whole generation: text encoding, denoising and decoding."""
    options = request.preset.generate
    with _bar(options.steps, title, quiet) as tick:
        began = time.perf_counter()
        frames = wan.generate(pipe, options, prompt, seed=request.seed, callback=tick)
        return frames, round(time.perf_counter() - began, 3)


@contextlib.contextmanager
def _bar(steps: int, title: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    with tqdm(
        total=steps,
        desc=title,
        unit="step",
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
        disable=quiet or not sys.stderr.isatty(),
    ) as bar:

        def tick(done: int) -> None:
            bar.update(done - bar.n)
            if done == steps:
                bar.set_description(f"{title}, decoding")

        yield tick


def _hush() -> None:
    """Keep the libraries' progress bars and notices out of ours; -v leaves them alone."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
