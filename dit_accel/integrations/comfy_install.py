"""Put the node pack into a ComfyUI folder, and take it out again. Imports no torch.

The pack is a small folder, `custom_nodes/dit_accel`, whose nodes are imported from this package. It is copied under a
name that ComfyUI does not load and renamed when it is whole, so that an interruption leaves the pack that was there, or
none. Other folders are never written to or deleted: a pack is ours if its pyproject.toml names it so.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit_accel.errors import EnvironmentProblem, UsageError

PACK = Path(__file__).parent / "comfy_pack"
FOLDER = "dit_accel"
_NAME = "dit-accel"  # in the pack's pyproject.toml
_PREFIX, _SUFFIX = ".dit_accel-", ".disabled"  # ComfyUI loads no folder whose name ends so
# What a ComfyUI folder holds: a checkout, or the folder that the desktop application keeps nodes and models in.
_MARKS = (("comfy", "nodes.py"), ("custom_nodes", "models"))


def install(comfy: Path) -> Path:
    """Put the pack into a ComfyUI folder, in the place of an older one.

    Args:
        comfy: the folder that holds `custom_nodes`.

    Returns:
        The pack's folder.

    Raises:
        UsageError: not a ComfyUI folder, or something else stands where the pack belongs. Nothing has changed then.
        EnvironmentProblem: the folder cannot be written to, or the pack is there under another name.
    """
    nodes = _nodes_of(comfy)
    place = _place_in(nodes)
    others = [found.name for found in _packs_in(nodes) if found != place]
    if others:
        raise EnvironmentProblem(
            f"{nodes / others[0]} is this pack too, and ComfyUI would load both: remove it (ComfyUI's manager can), or "
            "keep that one alone."
        )
    with _told(nodes):
        nodes.mkdir(exist_ok=True)
        _sweep(nodes)
        fresh = _aside(nodes)
        old = None
        try:
            shutil.copytree(PACK, fresh / FOLDER, ignore=shutil.ignore_patterns("__pycache__"))
            if place.exists():
                old = _aside(nodes)
                place.rename(old / FOLDER)
            (fresh / FOLDER).rename(place)
        finally:
            if old is not None and not place.exists():
                (old / FOLDER).rename(place)
            _sweep(nodes)
    return place


def uninstall(comfy: Path) -> Path:
    """Take the pack out of a ComfyUI folder.

    Args:
        comfy: the folder that holds `custom_nodes`.

    Returns:
        Where it was.

    Raises:
        UsageError: not a ComfyUI folder, no pack in it, or something else in its place. Nothing has changed then.
        EnvironmentProblem: the folder cannot be written to.
    """
    nodes = _nodes_of(comfy)
    place = _place_in(nodes)
    with _told(nodes):
        _sweep(nodes)
        if not place.exists():
            raise UsageError(f"{place} is not there: nothing of dit_accel is installed in this ComfyUI.")
        try:
            place.rename(_aside(nodes) / FOLDER)
        finally:
            _sweep(nodes)
    return place


def _nodes_of(comfy: Path) -> Path:
    """The folder of node packs, which need not be there yet.

    Raises:
        UsageError: not a ComfyUI folder.
    """
    if not any(all((comfy / name).exists() for name in marks) for marks in _MARKS):
        inner = comfy / "ComfyUI"
        hint = f"Did you mean {inner}?" if (inner / "nodes.py").is_file() else "Give the one that holds custom_nodes."
        raise UsageError(f"{comfy} is not a ComfyUI folder: there is no comfy/ with nodes.py in it. {hint}")
    return comfy / "custom_nodes"


def _place_in(nodes: Path) -> Path:
    """Where the pack belongs.

    Raises:
        UsageError: something else stands there.
    """
    place = nodes / FOLDER
    if place.is_symlink():
        target = os.readlink(place)
        raise UsageError(f"{place} is a link to {target}, and what it leads to is not ours: remove the link first.")
    if place.exists() and not _is_ours(place):
        raise UsageError(
            f"{place} is not a pack of dit_accel's: its pyproject.toml does not name it {_NAME}. Move it away first."
        )
    return place


def _is_ours(folder: Path) -> bool:
    try:
        told = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return told.get("project", {}).get("name") == _NAME and "comfy" in told.get("tool", {})


def _packs_in(nodes: Path) -> Iterator[Path]:
    """This pack under any name under which ComfyUI would load it."""
    if nodes.is_dir():
        yield from (one for one in sorted(nodes.iterdir()) if not one.name.endswith(_SUFFIX) and _is_ours(one))


def _aside(nodes: Path) -> Path:
    """A new folder beside the packs that ComfyUI does not load."""
    return Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=nodes))


def _sweep(nodes: Path) -> None:
    """Delete what was set aside, now or by one who was interrupted."""
    for left in nodes.glob(f"{_PREFIX}*{_SUFFIX}"):
        shutil.rmtree(left)


@contextmanager
def _told(nodes: Path) -> Iterator[None]:
    """The system's refusals, in a line."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"{nodes} could not be changed ({error.strerror or error}). Stop ComfyUI if it runs, and see that you may "
            "write there."
        ) from error
