"""Preset files: where they lie, how they are read, which version of the schema they speak. No torch.

Three places are looked at: the package (`shipped`), the current folder and the user's configuration folder; in the
latter two `dit-accel.toml` and `presets/*.toml`. A name means one preset: where two files have different presets of one
name, asking for that name is an error, and `FILE#NAME` says which. Files hold settings and are never executed.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dit_accel
import dit_accel.presets as shipped
from dit_accel.errors import UsageError

SCHEMA = 1  # the version that this program reads; a file without one is of version 1
SHIPPED = "shipped"
FOLDER_VARIABLE = "DIT_ACCEL_PRESETS"  # a folder to take for the user's configuration folder
_DEEPEST = 16  # tables within tables

Tables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class PresetFile:
    """The presets of one file, unresolved."""

    origin: str  # "shipped", or the path as one would write it
    tables: Tables


@dataclass(frozen=True)
class Shelf:
    """What can be asked for by name."""

    shipped: Tables
    users: tuple[PresetFile, ...]
    clashes: Mapping[str, UsageError]  # by name: why it does not say which preset is meant
    unread: tuple[UsageError, ...]  # files of the user that could not be read

    def holder(self, name: str) -> PresetFile | None:
        """The file that has the preset."""
        if name in self.shipped:
            return PresetFile(SHIPPED, self.shipped)
        return next((file for file in self.users if name in file.tables), None)

    def names(self) -> list[str]:
        """Every name, the shipped ones first."""
        own = {name for file in self.users for name in file.tables} - set(self.shipped)
        return [*sorted(self.shipped), *sorted(own)]


def read_shelf() -> Shelf:
    """The shipped presets and the user's own. Only a shipped file that cannot be read raises."""
    ours = read_shipped()
    users, unread = [], []
    try:
        for path in _user_paths():
            try:
                users.append(read_preset_file(path))
            except UsageError as error:
                unread.append(error)
    except UsageError as error:
        unread.append(error)
    return Shelf(ours, tuple(users), _clashes(ours, users), tuple(unread))


def read_shipped() -> dict[str, Mapping[str, Any]]:
    """The tables of the presets that ship with the package, by name."""
    tables: dict[str, Mapping[str, Any]] = {}
    for path in sorted(shipped.FOLDER.glob("*.toml")):
        tables |= read_preset_file(path).tables
    return tables


def read_preset_file(path: Path) -> PresetFile:
    """One file's tables, by name.

    Raises:
        UsageError: it is missing, not TOML, of a newer version, or has something outside its tables.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read preset file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"preset file {path} is not text in UTF-8") from None
    except ValueError as error:  # a path that cannot be one
        raise UsageError(f"cannot read preset file {str(path)!r}: {error}") from None
    return parse_presets(text, str(path))


def parse_presets(text: str, origin: str) -> PresetFile:
    """As `read_preset_file`, of a file's text; `origin` is its name."""
    try:
        tables = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError is one; so is what Python says of a number of 5,000 digits
        raise UsageError(f"preset file {origin} is not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"preset file {origin} is nested too deeply; a preset has tables of tables at most") from None
    _check_version(tables.pop("version", SCHEMA), origin)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"preset file {origin}: {name!r} stands outside a table; write it under [a-preset-name]")
    if _is_deeper(tables, _DEEPEST):
        raise UsageError(f"preset file {origin} is nested too deeply; a preset has tables of tables at most")
    return PresetFile(origin, tables)


def _check_version(version: Any, origin: str) -> None:
    known = f"dit-accel {dit_accel.__version__} reads version {SCHEMA}"
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UsageError(f"preset file {origin}: version = {version!r}: {known}; write version = {SCHEMA}, or nothing")
    if version > SCHEMA:
        raise UsageError(f"preset file {origin} is of version {version}, and {known}: upgrade dit-accel")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether tables or lists lie in one another deeper than that. Without recursion: it could be any depth."""
    inside = [value]
    for _ in range(levels):
        inside = [
            item
            for outer in inside
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
    return bool(inside)


def _user_paths() -> Iterator[Path]:
    """The user's files, each once. What the package itself ships is not among them, wherever one stands."""
    seen = {path.resolve() for path in shipped.FOLDER.glob("*.toml")}
    for folder in (Path(), _user_folder()):
        for path in (folder / "dit-accel.toml", *sorted((folder / "presets").glob("*.toml"))):
            if path.is_file() and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def _user_folder() -> Path:
    given = os.environ.get(FOLDER_VARIABLE)
    if not given:
        from platformdirs import user_config_path

        return user_config_path("dit-accel", appauthor=False)
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise UsageError(f"{FOLDER_VARIABLE}={given}: there is no such folder; name one, or unset it")
    return folder


def _clashes(ours: Tables, users: list[PresetFile]) -> dict[str, UsageError]:
    """Names that two files have for different presets. A copy of a shipped preset is no other one."""
    clashes: dict[str, UsageError] = {}
    holders: dict[str, PresetFile] = {name: PresetFile(SHIPPED, ours) for name in ours}
    for file in users:
        for name, table in file.tables.items():
            first = holders.setdefault(name, file)
            if first is file or first.tables[name] == table:
                continue
            where = "ships with dit-accel" if first.origin == SHIPPED else f"is in {first.origin}"
            clashes[name] = UsageError(
                f"preset {name!r} {where}, and {file.origin} has another of that name: rename one, or ask for "
                f"{file.origin}#{name}"
            )
    return clashes
