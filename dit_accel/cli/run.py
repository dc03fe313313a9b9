"""The working half of `generate`: load once, make each clip, keep the record. torch comes in here."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel import accelerate
from dit_accel.cli.making import announce, load, open_record, picture_for, timed
from dit_accel.cli.request import Clip, Request, dense_name
from dit_accel.cli.terminal import remark
from dit_accel.pipelines.staging import Stage
from dit_accel.pipelines.video import stage_clip


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
    if request.preset.is_stock:
        frames, clip["seconds"] = timed(pipe, request, asked, picture, f"{title}dense", quiet)
    else:
        # One handle a clip: its report speaks of this clip alone, and the pipeline is stock again after it.
        with accelerate(pipe, request.preset) as handle:
            frames, clip["seconds"] = timed(pipe, request, asked, picture, f"{title}fast", quiet)
            report = handle.report()
        clip["report"] = report.to_dict()
    dense = None
    if compare_dense:
        # Second on purpose: what a first run pays for warming up counts against the fast path, not for it.
        dense, seconds = timed(pipe, request, asked, picture, f"{title}dense", quiet)
        clip["dense"] = {
            "seconds": seconds,
            "time_ratio": round(seconds / clip["seconds"], 3),
            "psnr_db": _psnr(frames, dense),
        }
    clip["frames"] = list(frames.shape)
    return _Made(frames, dense, report, clip)


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
