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

from dit_accel.cli.request import Clip, Request
from dit_accel.cli.terminal import remark
from dit_accel.cli.versions import machine, versions
from dit_accel.pipelines.pictures import fit_picture, open_picture, share_cut


def announce(request: Request, *, quiet: bool, verbose: bool, seeds: str | None = None) -> None:
    """Say what is about to be made, and silence the libraries unless all is to be heard.

    Args:
        seeds: in words, or which clips, where they are not the request's.
    """
    if not verbose:
        _hush()
    preset = request.preset
    if seeds is None and request.count == 1:
        seeds = f"seed {request.seed}"
    elif seeds is None:
        seeds = f"seeds {request.seed} to {request.seed + request.count - 1}"
    remark(f"preset {preset.name} · {preset.model} · {seeds}", quiet=quiet)
    if preset.status == "provisional":
        remark(
            "note: this preset is provisional: its values are not yet backed by a measurement", quiet=quiet
        )


def load(request: Request, folder: Path) -> Any:
    """The pipeline of a request, from the model's folder."""
    recipe = request.recipe
    both = recipe.start_image(folder) == "optional"
    return recipe.load(
        str(folder),
        **({"from_image": True} if both and request.image is not None else {}),
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


def picture_for(request: Request, *, quiet: bool) -> Any:
    """The picture at which a request's videos begin, in their size; None where there is none."""
    if request.image is None:
        return None
    options = request.preset.generate
    picture = open_picture(request.image)
    cut = share_cut(picture, options.width, options.height)
    if cut > 0.05:
        remark(
            f"note: {cut:.0%} of {request.image} are cut off: it is {picture.width}x{picture.height}, the video "
            f"{options.width}x{options.height}",
            quiet=quiet,
        )
    return fit_picture(picture, options.width, options.height)


def timed(
    pipe: Any, request: Request, clip: Clip, picture: Any, title: str, quiet: bool
) -> tuple[np.ndarray, float]:
    """Frames and the seconds of the whole generation: text encoding, denoising and decoding."""
    options = request.preset.generate
    begins = {} if picture is None else {"image": picture}
    with _bar(options.steps, title, quiet) as tick:
        began = time.perf_counter()
        frames = request.recipe.generate(pipe, options, clip.prompt, seed=clip.seed, callback=tick, **begins)
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
