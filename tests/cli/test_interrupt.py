"""Ctrl-C in mid-run, delivered as a real signal to a real process."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dit_accel.pipelines.video import read_clip

RUN = ("generate", "--preset", "wan21-fast", "--size", "64x64", "--frames", "5", "--seed", "7")
SPARSE = ("--set", "block=16", "--set", "min_tokens=0", "--set", "dense_above=1.0")


def wait_for(path: Path, process, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"{path.name} did not come"
        time.sleep(0.02)


def test_finished_clips_stay_and_the_rest_leaves_no_trace(
    start_cli: Callable, cli: Callable, wan21_folder: Path, tmp_path: Path
) -> None:
    steps = ("--steps", "40", "--model", wan21_folder)
    (tmp_path / "prompts.txt").write_text("\n".join(f"star {n}" for n in range(50)))
    process = start_cli(*RUN, *SPARSE, *steps, "--prompts-file", "prompts.txt", "-o", "out/", cwd=tmp_path)
    first = tmp_path / "out" / "wan21-fast-7-0001.mp4"
    wait_for(tmp_path / "out" / "run.json", process)
    time.sleep(0.1)  # into the second clip
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "error: interrupted; nothing half-written was left"
    assert "Traceback" not in told

    record = json.loads((tmp_path / "out" / "run.json").read_text())
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert kept == sorted(
        [Path(file).name for clip in record["clips"] for file in clip["files"]] + ["run.json"]
    )
    assert len(record["clips"]) < 50
    before, _, _ = read_clip(first)

    # The same once more from the start: the aborted run has left nothing that could change it.
    again = cli(*RUN, *SPARSE, *steps, "--prompt", "star 0", "-o", "again.mp4", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert np.array_equal(read_clip(tmp_path / "again.mp4")[0], before)


def test_interrupted_in_the_first_clip(start_cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    steps = ("--steps", "3000", "--model", wan21_folder)
    process = start_cli(*RUN, *SPARSE, *steps, "--prompt", "star", "-o", "new/a.mp4", cwd=tmp_path)
    assert process.stderr.readline().startswith("preset wan21-fast")  # torch is there, the run begins
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "error: interrupted; nothing half-written was left"
    assert not list(tmp_path.iterdir())
