"""What the README and the reference say is what happens: their lines are run, their tables compared."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dit_accel import errors

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- python: (.+?) -->\n```python\n(.+?)```", README, re.S))


def report_of(text: str) -> tuple[int, int]:
    """(sparse calls, all self-attention calls) as the printed report has them."""
    found = re.search(r"(\d+) of (\d+) self-attention calls sparse", text)
    assert found, text
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("name", ["one seam", "a preset"])
def test_the_python_lines_run_and_report_sparse_calls(name: str, tmp_path: Path) -> None:
    """As they stand, but for the number of steps: two of the twenty."""
    lines = BLOCKS[name].replace("num_inference_steps=20", "num_inference_steps=2")
    assert lines != BLOCKS[name]
    lines += "assert video.shape == (33, 128, 128, 3), video.shape\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", lines], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sparse, calls = report_of(done.stdout)
    # Two steps, two branches, eight layers; a preset may keep steps dense.
    assert calls == 32 and 0 < sparse <= calls
    assert "no fall-backs" in done.stdout


def test_the_python_lines_are_all_run_here() -> None:
    assert set(BLOCKS) == {"one seam", "a preset"} and README.count("```python") == 2


@pytest.mark.parametrize("name", ["video", "tests"])
def test_ci_finds_the_commands(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", ROOT / ".ci" / "readme.py", name], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith(
        "python3 -m venv .venv && .venv/bin/pip install -c constraints"
    )


def test_the_video_command_is_understood(tmp_path: Path) -> None:
    """The README's own words, as a dry run."""
    command = subprocess.run(
        [sys.executable, "-P", ROOT / ".ci" / "readme.py", "video"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = command.split(".venv/bin/dit-accel ")[1].strip()
    shell = f'"{sys.executable}" -P -m dit_accel.cli {words} --dry-run --json'
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["preset"]["name"] == "tiny-wan-fast" and told["outputs"] == ["star.mp4"]


def test_every_dependency_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}
    assert names <= pinned, names - pinned


def test_the_reference_has_the_exit_codes() -> None:
    table = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)}
    raised = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    assert raised | {0, 130} == codes


def test_ci_is_runnable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
