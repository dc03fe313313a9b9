"""What the committed records say."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

RESULTS = Path(__file__).parents[2] / "scripts" / "results"
SECONDS = ("seconds", "denoise_seconds")


def read_record(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def committed() -> set[str]:
    """The names of the records that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=RESULTS, capture_output=True, text=True, check=True
    )
    return {name for name in listed.stdout.split("\0") if name}


def follow(record: Any, keys: Iterable[str | int]) -> Any:
    """What stands at the end of a way through a record."""
    for key in keys:
        record = record[key]
    return record


def is_rounded(told: str, true: float) -> bool:
    """Whether a number as it is told, "30.1", is the true one rounded to as many digits."""
    return abs(float(told) - true) <= 0.5 * 10 ** -len(told.partition(".")[2]) + 1e-9


def numbers(record: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record with the last key that leads to it."""
    if isinstance(record, dict):
        for name, value in record.items():
            yield from numbers(value, str(name))
    elif isinstance(record, list):
        for value in record:
            yield from numbers(value, key)
    elif isinstance(record, int | float) and not isinstance(record, bool):
        yield key, float(record)


def claimable(record: Any, unit: str) -> list[float]:
    """The numbers that can be told with a unit: PSNRs, or ratios of times, kept or those of dense and a variant."""
    if unit == "dB":
        return [value for key, value in numbers(record) if "psnr" in key]
    found = [value for key, value in numbers(record) if "ratio" in key or "times_as_fast" in key]
    summary = record.get("summary", {}) if isinstance(record, dict) else {}
    for name in (f"{name}_per_prompt" for name in SECONDS):
        dense = summary.get("dense", {}).get(name)
        found += [dense / of[name] for of in summary.values() if dense and of.get(name)]
    rows = record.get("rows", {}) if isinstance(record, dict) else {}
    for name in SECONDS if isinstance(rows, dict) and "dense" in rows else ():
        for middle in (mean, median):
            of = {
                variant: middle([row[name] for row in each if name in row] or [0])
                for variant, each in rows.items()
            }
            found += [of["dense"] / seconds for seconds in of.values() if seconds]
    return found
