"""The working half of `generate`: load once, make each clip, keep the record. torch comes in here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel import accelerate
from dit_accel.cli.making import announce, load, open_record, picture_for, timed
from dit_accel.cli.request import Clip, Request, dense_name
from dit_accel.cli.terminal import remark
from dit_accel.errors import FallbackError, NotFiniteError
from dit_accel.guards.memory import explain, is_out_of_memory
from dit_accel.pipelines.staging import Stage
from dit_accel.pipelines.video import stage_clip

MADE_AGAIN = "the clip was not finite and was made again without anything of dit_accel, from the same seed"


def run(
    request: Request,
    folder: Path,
    *,
    compare_dense: bool,
    metadata: bool,
    print_files: bool,
    quiet: bool,
    verbose: bool,
) -> dict[str, Any]:
    """Make every clip of a request.

    A clip is written only when it is whole, and together with run.json, so that an interrupted list keeps what was
    finished, and a record of it.

    Returns:
        What run.json holds.
    """
    announce(request, quiet=quiet, verbose=verbose)
    picture = picture_for(request, quiet=quiet)
    began = time.perf_counter()
    pipe = load(request, folder)
    record = {
        **open_record(request, pipe),
        "timings": {"load_seconds": round(time.perf_counter() - began, 3)},
        "clips": [],
    }
    for number, asked in enumerate(request.clips, start=1):
        title = f"{number}/{len(request.clips)} " if len(request.clips) > 1 else ""
        made = _make(pipe, request, asked, picture, title, compare_dense, quiet)
        _keep(made, request, asked, record, metadata)
        if verbose and made.report is not None:
            remark(str(made.report))
        remark(bargain(made.told, made.report, request.preset.name), quiet=quiet)
        if print_files:
            print(*made.told["files"], sep="\n", flush=True)
    return record


@dataclass(frozen=True)
class _Made:
    """A clip that was made, and is not written yet."""

    frames: np.ndarray
    dense: np.ndarray | None  # its twin
    report: Any  # what ran; None where all was stock
    told: dict[str, Any]  # what run.json says of it


def _make(
    pipe: Any,
    request: Request,
    asked: Clip,
    picture: Any,
    title: str,
    compare_dense: bool,
    quiet: bool,
) -> _Made:
    clip: dict[str, Any] = {"prompt": asked.prompt, "seed": asked.seed}
    report = None

    def dense() -> tuple[np.ndarray, float]:
        with told_of_memory(request):
            return timed(pipe, request, asked, picture, f"{title}dense", quiet)

    if request.preset.is_stock:
        frames, clip["seconds"] = dense()
    else:
        frames, clip["seconds"], report = _make_fast(pipe, request, asked, picture, f"{title}fast", quiet)
        if frames is None:
            clip["retry"] = {"reason": MADE_AGAIN, "seconds": clip["seconds"]}
            remark(f"WARNING: {MADE_AGAIN}")
            frames, clip["seconds"] = _make_again(dense)
        clip["report"] = report.to_dict()
    twin = None
    if compare_dense and "retry" not in clip:
        # Second on purpose: what a first run pays for warming up counts against the fast path, not for it.
        twin, seconds = dense()
        clip["dense"] = {
            "seconds": seconds,
            "time_ratio": round(seconds / clip["seconds"], 3),
            "psnr_db": _psnr(frames, twin),
        }
    clip["frames"] = list(frames.shape)
    return _Made(frames, twin, report, clip)


def _make_fast(
    pipe: Any, request: Request, asked: Clip, picture: Any, title: str, quiet: bool
) -> tuple[np.ndarray | None, float, Any]:
    """Frames, or None if they are not finite; the seconds they took; and the report.

    One handle a clip: its report speaks of this clip alone, and the pipeline is stock again after it.
    """
    with accelerate(pipe, request.preset) as handle, told_of_memory(request, handle):
        began = time.perf_counter()
        try:
            frames, seconds = timed(pipe, request, asked, picture, title, quiet)
            return frames, seconds, handle.report()
        except NotFiniteError as error:
            if request.preset.sparse is not None and request.preset.sparse.strict:
                raise FallbackError(
                    f"strict=True, and the clip would be made again without anything of dit_accel: {error}"
                ) from None
            report = handle.report()
            report = dataclasses.replace(report, guards={**report.guards, MADE_AGAIN: 1})
            return None, round(time.perf_counter() - began, 3), report


def _make_again(dense: Callable[[], tuple[np.ndarray, float]]) -> tuple[np.ndarray, float]:
    try:
        return dense()
    except NotFiniteError as error:
        raise NotFiniteError(
            f"{error}. Made again without anything of dit_accel it was the same: the model or its input is at fault."
        ) from None


@contextlib.contextmanager
def told_of_memory(request: Request, handle: Any = None) -> Iterator[None]:
    """If memory runs out, say in one line for what, and what to do.

    Raises:
        OutOfMemory: then.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        preset, ways = request.preset, ["--offload model", "fewer frames", "a smaller size"]
        if handle is not None:
            ways += ["--set cache.store_device=cpu"] * (preset.cache is not None)
            ways += ["--set region.keys=drop"] * (preset.region is not None)
        raise explain(error, {} if handle is None else handle.needs(), f"Try {', '.join(ways)}.") from error


def _keep(made: _Made, request: Request, asked: Clip, record: dict[str, Any], metadata: bool) -> None:
    """Add a clip to the record, and write both at once."""
    clip = made.told
    comment = {key: record[key] for key in ("tool", "versions", "preset", "machine")} | clip
    text = json.dumps(comment, separators=(",", ":")) if metadata else None
    fps = request.preset.generate.fps
    with Stage() as stage:
        clip["files"] = [str(file) for file in stage_clip(stage, asked.output, made.frames, fps, text)]
        if made.dense is not None:
            twin = stage_clip(stage, dense_name(asked.output), made.dense, fps)
            clip["dense"]["files"] = [str(file) for file in twin]
        record["clips"].append(clip)
        stage.write_text(request.record, json.dumps(record, indent=2) + "\n")


def bargain(clip: dict[str, Any], report: Any, preset: str) -> str:
    """The closing line: time, against dense if that was measured, what ran sparse, and what fell back."""
    line = f"{clip['seconds']:.1f} s"
    if "retry" in clip:
        return f"{line} · dense, after {clip['retry']['seconds']:.1f} s in vain: {clip['retry']['reason']}"
    if "dense" in clip:
        dense = clip["dense"]
        psnr = "identical" if dense["psnr_db"] is None else f"PSNR {dense['psnr_db']:.1f} dB"
        line += f" against {dense['seconds']:.1f} s dense ({dense['time_ratio']:.2f}x, {psnr})"
    if report is None:
        return f"{line} · dense, as preset {preset} asks"
    if "dense" not in clip:
        line += " (dense not measured: --compare-dense)"
    return f"{line} · {report.closing_line}"


def _psnr(frames: np.ndarray, dense: np.ndarray) -> float | None:
    """PSNR in dB over the whole clip; None where the clips are equal (JSON has no infinity)."""
    from dit_accel.quality.metrics import psnr

    if np.array_equal(frames, dense):
        return None
    return round(float(psnr(frames, dense)), 3)
