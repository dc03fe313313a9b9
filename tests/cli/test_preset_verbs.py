"""`presets list`, `diff` and `validate` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

GOOD = '[mine]\nextends = "tiny-wan-fast"\ndescription = "[red]mine"\nlevel = "balanced"\n[mine.sparse]\nkeep = 0.5\n'
BAD = '[wrong]\nextends = "tiny-wan-fast"\n[wrong.sparse]\nkep = 0.5\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with presets of its own, good and bad, and no configuration folder."""
    (tmp_path / "config").mkdir()
    monkeypatch.setenv("DIT_ACCEL_PRESETS", str(tmp_path / "config"))
    (tmp_path / "dit-accel.toml").write_text(f"version = 1\n{GOOD}{BAD}")
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "broken.toml").write_text("[broken\n")
    (tmp_path / "presets" / "taken.toml").write_text(GOOD.replace("mine", "wan21-fast"))
    return tmp_path


def run(cli: Callable, folder: Path, *arguments: str, **environment: str):
    return cli("presets", *arguments, cwd=folder, DIT_ACCEL_PRESETS=str(folder / "config"), **environment)


def test_list_tells_level_status_and_place_and_passes_over_what_is_broken(cli: Callable, folder: Path) -> None:
    done = run(cli, folder, "list", "--json")
    assert done.returncode == 0
    listed = {preset["name"]: preset for preset in json.loads(done.stdout)}
    assert listed["mine"]["origin"] == "dit-accel.toml" and listed["mine"]["level"] == "balanced"
    assert listed["tiny-wan"]["origin"] == "shipped" and listed["tiny-wan"]["level"] == "exact"
    assert "wrong" not in listed and "broken" not in listed
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all(line.startswith("left out: ") for line in lines)
    for told in ("presets/broken.toml is not valid TOML", "Did you mean 'keep'", "presets/taken.toml#wan21-fast"):
        assert any(told in line for line in lines), told
    table = run(cli, folder, "list", COLUMNS="240").stdout
    (row,) = [line for line in table.splitlines() if "[red]mine" in line]
    assert {"mine", "balanced", "provisional", "dit-accel.toml"} <= set(row.split())


def test_diff(cli: Callable, folder: Path) -> None:
    done = run(cli, folder, "diff", "tiny-wan-fast", "mine", "--json")
    assert done.returncode == 0 and done.stderr == ""
    told = json.loads(done.stdout)
    assert (told["a"], told["b"]) == ("tiny-wan-fast", "mine")
    rows = {row["value"]: row for row in told["differences"]}
    assert rows["sparse.keep"] == {
        "value": "sparse.keep", "a": 0.35, "source_a": "preset tiny-wan-fast", "b": 0.5, "source_b": "preset mine",
    }  # fmt: skip
    assert set(rows) == {"sparse.keep", "level", "status"}
    table = run(cli, folder, "diff", "tiny-wan", "tiny-wan-fast").stdout
    assert "sparse.dense_above" in table and "absent" in table and "generate.steps" not in table
    assert "sparse.impl" not in table  # of the part that one is without, and nobody's choice
    assert "the same values" in run(cli, folder, "diff", "mine", "dit-accel.toml#mine").stdout
    wrong = run(cli, folder, "diff", "mine", "min")
    assert wrong.returncode == 2 and "Did you mean 'mine'" in wrong.stderr


def test_validate_reads_every_table_of_every_file(cli: Callable, folder: Path) -> None:
    files = ("dit-accel.toml", "presets/broken.toml", "presets/taken.toml", "none.toml")
    done = run(cli, folder, "validate", *files)
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["dit-accel.toml#mine: sound", "presets/taken.toml#wan21-fast: sound"]
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) == 3
    for told in ("dit-accel.toml#wrong: ", "presets/broken.toml is not valid TOML", "cannot read preset file none"):
        assert sum(told in line for line in lines) == 1, told
    told = json.loads(run(cli, folder, "validate", "dit-accel.toml", "--json").stdout)
    assert [(entry["file"], entry["preset"], entry["error"] is None) for entry in told] == [
        ("dit-accel.toml", "mine", True), ("dit-accel.toml", "wrong", False),
    ]  # fmt: skip
    (folder / "good.toml").write_text(GOOD)
    done = run(cli, folder, "validate", "good.toml")
    assert done.returncode == 0 and done.stderr == "" and done.stdout == "good.toml#mine: sound\n"


def test_validate_tells_every_mistake_of_a_table(cli: Callable, folder: Path) -> None:
    (folder / "bad.toml").write_text(
        'version = 1\n[a]\nextends = "tiny-wan"\nmodle = "x"\nlevle = "fast"\nstatus = "good"\n'
        "[a.generate]\nstep = 3\n[a.sparse]\nkeep = 2\n[a.cache]\nname = 'esay'\n[a.region]\nselector = 'x'\n"
    )
    done = run(cli, folder, "validate", "bad.toml")
    lines = done.stderr.splitlines()
    told = ("'modle'", "'levle'", "'step'", "keep=2", "'esay'", "selector", "'good'")
    assert done.returncode == 2 and len(lines) == len(told)
    assert all(word in line for word, line in zip(told, lines, strict=True))
    shown = run(cli, folder, "show", "bad.toml")
    assert shown.returncode == 2 and shown.stderr.splitlines() == [lines[0].replace("bad.toml#a: ", "")]


def test_validate_refuses_a_file_without_presets(cli: Callable, folder: Path) -> None:
    (folder / "empty.toml").write_text("version = 1\n")
    done = run(cli, folder, "validate", "empty.toml")
    assert done.returncode == 2 and "holds no preset" in done.stderr


def test_show_tells_what_figures_rest_on(cli: Callable, folder: Path) -> None:
    shown = run(cli, folder, "show", "tiny-wan-fast", COLUMNS="200").stdout
    assert "measured, level fast, from shipped" in shown
    assert "provenance.figures.psnr_db" in shown and "30.1 (tiny_wan_quality_cpu.json)" in shown
    told = json.loads(run(cli, folder, "show", "tiny-wan-fast", "--json").stdout)
    assert told["provenance"]["figures"]["psnr_db"]["at"] == ["summary", "fast", "psnr_mean"]
