"""Presets of the user's own: found by name, never in place of a shipped one, never in its way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import dit_accel.presets
from dit_accel.errors import UnknownNameError, UsageError
from dit_accel.preset import load_preset
from dit_accel.preset_files import read_preset_file, read_shelf

OWN = '[{name}]\nextends = "tiny-wan-fast"\n[{name}.sparse]\nkeep = {keep}\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and an empty configuration folder beside it, `../config`."""
    (tmp_path / "here").mkdir()
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DIT_ACCEL_PRESETS", str(tmp_path / "config"))
    return tmp_path / "here"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "place", ["dit-accel.toml", "presets/some.toml", "../config/dit-accel.toml", "../config/presets/some.toml"]
)
def test_each_place_is_looked_into(place: str, here: Path) -> None:
    write(here / place, OWN.format(name="mine", keep=0.5))
    mine = load_preset("mine")
    assert mine.sparse.keep == 0.5 and mine.origin != "shipped" and Path(mine.origin).name == Path(place).name
    assert load_preset(mine.origin) == mine and load_preset(f"{mine.origin}#mine") == mine
    assert load_preset("tiny-wan").origin == "shipped"


def test_other_files_are_not(here: Path) -> None:
    for place in ("other.toml", "presets/deeper/mine.toml", "presets/mine.txt", "../dit-accel.toml"):
        (here / place).parent.mkdir(exist_ok=True, parents=True)
        (here / place).write_text(OWN.format(name="mine", keep=0.5))
    with pytest.raises(UnknownNameError, match="Unknown preset 'mine'"):
        load_preset("mine")


def test_the_configuration_folder_of_the_system(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIT_ACCEL_PRESETS")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    if sys.platform != "linux":
        pytest.skip("the folder's place is another one on this system")
    (tmp_path / ".config").mkdir()
    write(tmp_path / ".config" / "dit-accel" / "dit-accel.toml", OWN.format(name="mine", keep=0.5))
    assert load_preset("mine").sparse.keep == 0.5


def test_a_name_means_one_preset(here: Path) -> None:
    write(here / "dit-accel.toml", OWN.format(name="wan21-fast", keep=0.5))
    with pytest.raises(UsageError, match=r"'wan21-fast' ships with dit-accel, and dit-accel.toml has another"):
        load_preset("wan21-fast")
    assert load_preset("dit-accel.toml#wan21-fast").sparse.keep == 0.5
    assert load_preset("wan21-balanced").origin == "shipped"
    write(here / "dit-accel.toml", OWN.format(name="mine", keep=0.5))
    write(here / "presets" / "some.toml", OWN.format(name="mine", keep=0.6))
    with pytest.raises(UsageError, match=r"'mine' is in dit-accel.toml, and presets/some.toml has another"):
        load_preset("mine")
    write(here / "presets" / "some.toml", OWN.format(name="mine", keep=0.5))
    assert load_preset("mine").origin == "dit-accel.toml"


def test_a_shipped_preset_beside_broken_files(here: Path) -> None:
    write(here / "dit-accel.toml", "[mine\n")
    write(here / "presets" / "new.toml", "version = 7\n[theirs]\n")
    write(here / "presets" / "wrong.toml", "[wrong]\nextends = 'tiny-wan'\nmodle = 'x'\n")
    assert load_preset("tiny-wan-fast").origin == "shipped"
    with pytest.raises(UnknownNameError) as caught:
        load_preset("mine")
    line = str(caught.value)
    assert "Not looked into: preset file dit-accel.toml is not valid TOML" in line and "of version 7" in line
    assert len(line.splitlines()) == 1
    with pytest.raises(UsageError, match="Did you mean 'model'"):
        load_preset("wrong")


def test_a_configuration_folder_that_is_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_ACCEL_PRESETS", str(here / "nowhere"))
    assert load_preset("tiny-wan").origin == "shipped"
    with pytest.raises(UnknownNameError, match=r"DIT_ACCEL_PRESETS=.*there is no such folder"):
        load_preset("mine")


def test_the_packages_own_folder_is_no_place_of_the_users(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout `./presets` holds the shipped files themselves."""
    monkeypatch.chdir(dit_accel.presets.FOLDER.parent)
    shelf = read_shelf()
    assert not shelf.users and not shelf.clashes


def test_copies_of_shipped_presets_are_no_others(here: Path) -> None:
    """A checkout beside an installed package."""
    for path in dit_accel.presets.FOLDER.glob("*.toml"):
        write(here / "presets" / path.name, path.read_text())
    shelf = read_shelf()
    assert shelf.users and not shelf.clashes and load_preset("wan21-fast").origin == "shipped"


def test_a_file_is_data(here: Path) -> None:
    """Nothing in a file is run or filled in: what looks like code is a text."""
    code = "{__import__('os').system('touch ran')} $(touch ran) `touch ran`"
    path = write(here / "dit-accel.toml", f'[mine]\nextends = "tiny-wan"\ndescription = "{code}"\n')
    assert "$(touch ran)" in load_preset("mine").description
    assert [file.name for file in here.iterdir()] == ["dit-accel.toml"] and read_preset_file(path).tables
