"""What the first pages tell people to type is understood, and what they say of presets is so."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dit_accel.preset import load_preset
from dit_accel.preset_files import read_preset_file

from .messages import ROOT

COLUMNS = ("exact", "balanced", "fast", "turbo")


def blocks(page: str, language: str) -> list[str]:
    """The code of a page in one language."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


COMMANDS = sorted(
    {
        line.partition("  #")[0].strip()
        for page in ("index.md", "choosing.md")
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.startswith("dit-accel generate")
    }
)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(
    line: str, cli: Callable[..., subprocess.CompletedProcess], tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "first.png")
    words = [word for word in shlex.split(line)[1:] if word != "--dry-run"]
    done = cli(*words, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_python_lines_run(tmp_path: Path) -> None:
    """As they stand, but for the number of steps and the size: two of the twenty, and as small as may be."""
    (lines,) = blocks("index.md", "python")
    full, least = "height=128, width=128, num_frames=33, num_inference_steps=20", "num_inference_steps=2"
    assert full in lines
    short = lines.replace(full, f"height=64, width=64, num_frames=9, {least}")
    done = subprocess.run(
        [sys.executable, "-P", "-c", short], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d+ of 32 self-attention calls sparse", done.stdout), done.stdout


def rows() -> list[list[str]]:
    """The cells of the table of presets, without the model's."""
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    table = text.partition("| model and size |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip().strip("|").split("|")][1:] for line in table]


def test_the_table_has_every_level_right() -> None:
    found = {name: column for row in rows() for name, column in zip(row, COLUMNS, strict=True) if name}
    assert len(found) > 30
    assert {name: load_preset(name).level for name in found} == found


def test_the_table_has_every_preset_of_a_model() -> None:
    """All but those that show a method each."""
    told = {name for row in rows() for name in row if name}
    files = [path for path in (ROOT / "presets").glob("*.toml") if path.name != "methods.toml"]
    assert told == {name for path in files for name in read_preset_file(path).tables if name != "version"}
