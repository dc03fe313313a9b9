"""Provenance: on what a preset's claim to be measured rests. Importing this module imports no torch.

    [tiny-wan-fast.provenance]
    record = "tiny_wan_quality_cpu.json"
    revision = "sha256:..."
    size = "33 frames of 128x128"
    steps = 20
    scheduler = "UniPCMultistepScheduler"
    gpu = "CPU x86_64, 2 threads"
    date = "2026-11-21"
    [tiny-wan-fast.provenance.figures]
    psnr_db = { value = 30.1, at = ["summary", "fast", "psnr_mean"] }

Only the shape is checked here: records are not installed with the package. The tests of the repository open them and
compare.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import UsageError, unknown_name
from dit_accel.typed import check_type

Keys = tuple[str | int, ...]

_TEXTS = ("record", "revision", "size", "scheduler", "gpu", "date")
_NEEDED = (*_TEXTS, "steps", "figures")
_OF_A_FIGURE = ("value", "at", "over", "record")


@dataclass(frozen=True)
class Figure:
    """One number that is claimed, and where a record has it."""

    value: float
    record: str  # a file of scripts/results
    at: Keys  # the way to the number through the record: keys of tables, places in lists
    over: Keys | None = None  # the number is what stands at `at` divided by what stands here

    def to_mapping(self) -> dict[str, Any]:
        """The table of a figure, as JSON."""
        told = {"value": self.value, "record": self.record, "at": list(self.at)}
        return told if self.over is None else {**told, "over": list(self.over)}


@dataclass(frozen=True)
class Provenance:
    """What was run, on what, and the numbers that came of it."""

    record: str  # a file of scripts/results
    revision: str  # of the model: a commit of its repository, or a checksum of its weights
    size: str  # of what was made, in words
    steps: int
    scheduler: str  # class of diffusers
    gpu: str  # the record's name for the chip; a CPU where none was used
    date: str  # YYYY-MM-DD
    figures: Mapping[str, Figure]  # by name, with its unit: psnr_db, times_as_fast, seconds

    def to_mapping(self) -> dict[str, Any]:
        """The table of a preset, as JSON."""
        told = {key: getattr(self, key) for key in (*_TEXTS, "steps")}
        return {**told, "figures": {name: figure.to_mapping() for name, figure in self.figures.items()}}


def read_provenance(table: Any, where: str) -> Provenance:
    """Build it from a preset's `[provenance]` table.

    Raises:
        UsageError: a key that is missing, unknown or of the wrong form.
    """
    where = f"{where}: provenance"
    if not isinstance(table, Mapping):
        raise UsageError(f"{where} must be a table, got {table!r}")
    for key in table:
        if key not in _NEEDED:
            raise unknown_name(f"key of {where}", key, _NEEDED)
    missing = [key for key in _NEEDED if key not in table]
    if missing:
        raise UsageError(f"{where} lacks {', '.join(missing)}: it tells all of {', '.join(_NEEDED)}")
    texts = {key: check_type(table[key], str, key, where) for key in _TEXTS}
    for key, text in texts.items():
        if not text.strip():
            raise UsageError(f"{where}: {key} is empty")
    steps = check_type(table["steps"], int, "steps", where)
    if steps < 1:
        raise UsageError(f"{where}: steps = {steps}: at least 1 is needed")
    try:
        day = datetime.date.fromisoformat(texts["date"]).isoformat()
    except ValueError:
        raise UsageError(f"{where}: date = {texts['date']!r}: write it as 2026-11-21") from None
    texts |= {"record": _record(texts["record"], where), "date": day}
    return Provenance(**texts, steps=steps, figures=_figures(table["figures"], texts["record"], where))


def _figures(tables: Any, record: str, where: str) -> dict[str, Figure]:
    if not isinstance(tables, Mapping) or not tables:
        raise UsageError(f"{where}: figures is a table of at least one number, got {tables!r}")
    return {name: _figure(table, record, f"{where}: figure {name!r}") for name, table in tables.items()}


def _figure(table: Any, record: str, where: str) -> Figure:
    if not isinstance(table, Mapping):
        raise UsageError(f"{where} is a table, say {{ value = 30.1, at = [\"summary\", \"psnr\"] }}, got {table!r}")
    for key in table:
        if key not in _OF_A_FIGURE:
            raise unknown_name(f"key of {where}", key, _OF_A_FIGURE)
    for key in ("value", "at"):
        if key not in table:
            raise UsageError(f"{where} lacks {key}: it has value and at, the keys that lead to it in the record")
    value = check_type(table["value"], float, "value", where)
    if not math.isfinite(value):
        raise UsageError(f"{where}: value = {value}: a finite number is needed")
    over = _keys(table["over"], "over", where) if "over" in table else None
    return Figure(value, _record(table.get("record", record), where), _keys(table["at"], "at", where), over)


def _keys(given: Any, name: str, where: str) -> Keys:
    fits = isinstance(given, list) and given and all(type(key) in (str, int) for key in given)
    if not fits:
        raise UsageError(f"{where}: {name} = {given!r}: a list of keys is needed, say [\"summary\", \"psnr\"]")
    return tuple(given)


def _record(given: Any, where: str) -> str:
    if not isinstance(given, str) or not re.fullmatch(r"\w[\w.-]*\.json", given):
        raise UsageError(f"{where}: record = {given!r}: the name of a JSON file in scripts/results is needed")
    return given
