"""The node pack's way into a ComfyUI folder and out of it: whole or not at all, and nothing of others is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.integrations.comfy_install import PACK, install, uninstall

Files = dict[str, bytes]


def files(folder: Path) -> Files:
    """Every file under a folder by its path; folders with a slash behind them."""
    found = sorted(folder.rglob("*"))
    return {
        one.relative_to(folder).as_posix() + "/" * one.is_dir(): b"" if one.is_dir() else one.read_bytes()
        for one in found
    }


def pack() -> Files:
    return {name: data for name, data in files(PACK).items() if "__pycache__" not in name}


def checkout(folder: Path) -> Path:
    """ComfyUI as it is cloned."""
    for name in ("comfy", "custom_nodes", "models"):
        (folder / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py", "custom_nodes/websocket_image_save.py"):
        (folder / name).write_text("# ComfyUI's own\n", encoding="utf-8")
    return folder


def bare(folder: Path) -> Path:
    """One into which nothing was ever put."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "nodes.py").touch()
    (folder / "custom_nodes").mkdir()
    return folder


def desktop(folder: Path) -> Path:
    """What the desktop application keeps: no code of ComfyUI."""
    for name in ("custom_nodes/ComfyUI-Other/web", "models", "user"):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes/ComfyUI-Other/__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    return folder


def with_an_older_pack(folder: Path) -> Path:
    checkout(folder)
    place = folder / "custom_nodes" / "dit_accel"
    shutil.copytree(PACK, place)
    (place / "web" / "docs" / "DitAccelGone.md").write_text("of an older release", encoding="utf-8")
    (place / "__init__.py").write_text("an older release", encoding="utf-8")
    return folder


TREES = [bare, checkout, desktop, with_an_older_pack]
each_tree = pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.__name__)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from dit_accel.cli.app import run

    def called(*words: object) -> tuple[int, str, str]:
        code = run(list(map(str, words)))
        return code, *capsys.readouterr()

    return called


@each_tree
def test_twice_leaves_one_pack_and_uninstall_leaves_nothing(tree: Callable, tmp_path: Path, cli: Callable) -> None:
    comfy = tree(tmp_path / "ComfyUI")
    place = comfy / "custom_nodes" / "dit_accel"
    others = {name: data for name, data in files(comfy).items() if "/dit_accel" not in name}
    for _ in range(2):
        code, out, err = cli("comfy", "install", comfy)
        assert (code, out) == (0, f"{place}\n") and len(err.splitlines()) == 1
        assert files(place) == pack()
        assert {name: data for name, data in files(comfy).items() if "/dit_accel" not in name} == others
        assert [one.name for one in (comfy / "custom_nodes").iterdir() if "dit_accel" in one.name] == ["dit_accel"]
    code, out, _ = cli("comfy", "uninstall", comfy)
    assert (code, out) == (0, f"{place}\n")
    assert files(comfy) == others
    code, out, err = cli("comfy", "uninstall", comfy)
    assert (code, out) == (2, "") and "nothing of dit_accel is installed" in err
    assert files(comfy) == others


def test_a_checkout_without_the_folder_of_packs_gets_one(tmp_path: Path) -> None:
    comfy = bare(tmp_path)
    (comfy / "custom_nodes").rmdir()
    assert files(install(comfy)) == pack()


# Interrupted at the n-th file that is written and at each renaming: by Ctrl-C, and killed on the spot.
INTERRUPTED = """
import os, sys
from pathlib import Path
from dit_accel.integrations import comfy_install
count = 0
def watch(event, args):
    global count
    written = event == "open" and isinstance(args[0], str) and ".disabled" in args[0] and args[2] & os.O_CREAT
    if event == "os.rename" or written:
        count += 1
        if count == int(sys.argv[3]):
            if sys.argv[4] == "killed":
                os._exit(9)
            raise KeyboardInterrupt
sys.addaudithook(watch)
getattr(comfy_install, sys.argv[1])(Path(sys.argv[2]))
"""


def loaded(comfy: Path) -> dict[str, Files]:
    """What ComfyUI would load: its own rule of names."""
    packs = (one for one in (comfy / "custom_nodes").iterdir() if one.is_dir() and not one.name.endswith(".disabled"))
    return {one.name: {name: data for name, data in files(one).items() if "__pycache__" not in name} for one in packs}


@pytest.mark.parametrize("how", ["interrupted", "killed"])
@pytest.mark.parametrize("verb", ["install", "uninstall"])
@pytest.mark.parametrize("tree", [checkout, with_an_older_pack], ids=lambda tree: tree.__name__)
def test_an_interruption_leaves_the_pack_before_or_behind_it(
    tree: Callable, verb: str, how: str, tmp_path: Path
) -> None:
    """Never a part of one; and the next installation is as any other."""
    if verb == "uninstall" and tree is checkout:
        tree = with_an_older_pack
    points = 0
    while True:
        points += 1
        comfy = tree(tmp_path / f"{points}")
        before = loaded(comfy)
        command = [sys.executable, "-P", "-c", INTERRUPTED, verb, str(comfy), str(points), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            break
        after = loaded(comfy)
        others = {name: whole for name, whole in before.items() if name != "dit_accel"}
        assert after in (before, {**others, "dit_accel": pack()}, others), (points, done.stderr)
        if how == "interrupted":
            assert "KeyboardInterrupt" in done.stderr
            assert after != others or not before or verb == "uninstall"  # the older one is put back
            assert not list((comfy / "custom_nodes").glob(".*")), points
        assert files(install(comfy)) == pack()
        assert not list((comfy / "custom_nodes").glob(".*"))
    assert points > (1 if verb == "uninstall" else len(pack()) // 2)


def test_what_is_no_comfyui_is_refused(tmp_path: Path, cli: Callable) -> None:
    (tmp_path / "notes.txt").touch()
    before = files(tmp_path)
    for verb in ("install", "uninstall"):
        for path in (tmp_path, tmp_path / "missing", tmp_path / "notes.txt"):
            code, out, err = cli("comfy", verb, path)
            assert (code, out) == (2, "") and len(err.splitlines()) == 1
            assert f"error: {path} is not a ComfyUI folder" in err
    assert files(tmp_path) == before


def test_the_folder_around_it_is_told(tmp_path: Path, cli: Callable) -> None:
    """As in the portable release for Windows."""
    comfy = checkout(tmp_path / "ComfyUI")
    code, _, err = cli("comfy", "install", tmp_path)
    assert code == 2 and f"Did you mean {comfy}?" in err


@pytest.mark.parametrize("other", ["a folder", "a file", "a link", "another pack"])
def test_what_is_not_ours_stays(other: str, tmp_path: Path, cli: Callable) -> None:
    comfy = checkout(tmp_path / "ComfyUI")
    place = comfy / "custom_nodes" / "dit_accel"
    if other == "a file":
        place.write_text("precious", encoding="utf-8")
    elif other == "a link":
        shutil.copytree(PACK, tmp_path / "mine")
        place.symlink_to(tmp_path / "mine")
    else:
        place.mkdir()
        (place / "precious.txt").write_text("precious", encoding="utf-8")
    if other == "another pack":
        (place / "pyproject.toml").write_text('[project]\nname = "dit-accel-fork"\n[tool.comfy]\n', encoding="utf-8")
    before = files(tmp_path)
    for verb in ("install", "uninstall"):
        code, out, err = cli("comfy", verb, comfy)
        assert (code, out) == (2, "") and str(place) in err and len(err.splitlines()) == 1
    assert files(tmp_path) == before and place.is_symlink() == (other == "a link")


def test_the_same_pack_from_the_registry_is_not_loaded_twice(tmp_path: Path) -> None:
    comfy = checkout(tmp_path)
    other = comfy / "custom_nodes" / "dit-accel"
    shutil.copytree(PACK, other)
    with pytest.raises(EnvironmentProblem, match="is this pack too, and ComfyUI would load both"):
        install(comfy)
    other.rename(other.with_name("dit-accel.disabled"))  # as ComfyUI's manager turns one off
    install(comfy)
    assert files(other.with_name("dit-accel.disabled")) and set(loaded(comfy)) == {"dit_accel"}


def test_a_folder_that_may_not_be_written_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comfy = checkout(tmp_path)
    before = files(comfy)
    if os.geteuid() == 0:  # whom no permission stops

        def refuse(*_: object, **__: object) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.mkdtemp", refuse)
    else:
        (comfy / "custom_nodes").chmod(0o500)
    with pytest.raises(EnvironmentProblem, match="could not be changed .Permission denied"):
        install(comfy)
    (comfy / "custom_nodes").chmod(0o700)
    assert files(comfy) == before


def test_uninstalling_where_nothing_is_changes_nothing(tmp_path: Path) -> None:
    comfy = checkout(tmp_path)
    before = files(comfy)
    with pytest.raises(UsageError, match="nothing of dit_accel is installed"):
        uninstall(comfy)
    assert files(comfy) == before
