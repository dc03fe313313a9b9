"""Ctrl-C in mid-run, delivered as a real signal to a real process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
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


def test_a_clip_and_its_record_come_together(
    cli_environment: dict[str, str], wan21_folder: Path, tmp_path: Path
) -> None:
    """Ctrl-C at the worst moment: a clip's file has its name, and its twin and the record have none yet."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dit_accel.cli.app import run\n"
        "rename = os.replace\n"
        "def rename_and_interrupt(part, path):\n"
        "    rename(part, path)\n"
        "    if str(path).endswith('.mp4'):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "os.replace = rename_and_interrupt\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    more = ["--steps", "2", "--model", wan21_folder, "--prompt", "star", "--compare-dense", "-o", "out/a.mp4"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *RUN, *SPARSE, *more],
        cwd=tmp_path,
        env=cli_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "error: interrupted; nothing half-written was left"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a-dense.mp4", "a.mp4", "run.json"]
    (clip,) = json.loads((tmp_path / "out" / "run.json").read_text())["clips"]
    assert clip["files"] == ["out/a.mp4"] and clip["dense"]["files"] == ["out/a-dense.mp4"]
