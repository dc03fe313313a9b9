"""Which clip is compared with which: two files, two folders, or the record of `generate --compare-dense`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.bench.results import Quality
from dit_accel.errors import UsageError
from dit_accel.pipelines.video import READABLE, read_files

if TYPE_CHECKING:
    from dit_accel.quality.perceptual import Lpips


@dataclass(frozen=True)
class Pair:
    """A reference and what is measured against it."""

    name: str
    reference: tuple[Path, ...]  # one file, or one image a frame
    other: tuple[Path, ...]
    told: str = ""  # the prompt, where it is known
    fps: float | None = None  # None: as the files tell
    seconds: tuple[float, float] | None = None  # of the reference and of the other, where they are known


@dataclass(frozen=True)
class Pairs:
    """All that is compared."""

    pairs: tuple[Pair, ...]
    labels: tuple[str, str]
    left_out: tuple[str, ...] = ()  # files without a counterpart


@dataclass(frozen=True)
class Compared:
    """A pair and the distance between the two."""

    pair: Pair
    size: tuple[int, int, int]  # frames, height, width
    quality: Quality


def find_pairs(first: Path, second: Path | None) -> Pairs:
    """Pairs of two files, of the equal names in two folders, or of a run.json. Reads no clip.

    Raises:
        UsageError: something that is missing, or does not go together.
    """
    if first.suffix.lower() == ".json":
        if second is not None:
            raise UsageError(f"{first} names both sides of the comparison: leave {second} out")
        return _of_record(first)
    if second is None:
        raise UsageError(f"{first} against what? Give two clips or two folders, or run.json alone")
    for path in (first, second):
        if not path.exists():
            raise UsageError(f"{path} does not exist")
    if first.is_dir() != second.is_dir():
        raise UsageError(f"{first} and {second}: give two files or two folders, not one of each")
    labels = _labels(first, second)
    if not first.is_dir():
        return Pairs((Pair(second.name, (first,), (second,)),), labels)
    ours, theirs = (_clips_in(folder) for folder in (first, second))
    common = sorted(ours & theirs)
    if not common:
        raise UsageError(f"{first} and {second} hold no clips of equal names ({', '.join(READABLE)})")
    pairs = tuple(Pair(name, (first / name,), (second / name,)) for name in common)
    return Pairs(pairs, labels, tuple(sorted(ours ^ theirs)))


def compare_pair(pair: Pair, lpips: Lpips | str) -> Compared:
    """Read both clips of a pair and measure them.

    Raises:
        UsageError: a file that cannot be read, or clips that differ in size or length.
    """
    from dit_accel.quality.against import measure_quality

    (reference, _), (other, _) = read_files(pair.reference), read_files(pair.other)
    if reference.shape != other.shape:
        raise UsageError(
            f"{pair.reference[0]} is {_told(reference.shape)}, {pair.other[0]} is {_told(other.shape)}; "
            "only clips of one size and length can be compared"
        )
    return Compared(pair, tuple(reference.shape[:3]), measure_quality(other, reference, lpips))


def _of_record(path: Path) -> Pairs:
    """The dense twins of a run.json, which lie beside it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        clips, preset = record["clips"], record["preset"]
        if record["tool"] != "dit_accel":
            raise KeyError("tool")
        pairs = tuple(_of_clip(path.parent, clip, preset) for clip in clips if "dense" in clip)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is no run.json of dit-accel generate") from None
    if not pairs:
        raise UsageError(f"{path} has no dense twins; run generate with --compare-dense, or give two clips")
    return Pairs(pairs, ("dense", preset["name"]))


def _of_clip(folder: Path, clip: dict[str, Any], preset: dict[str, Any]) -> Pair:
    twin, own = ([folder / Path(name).name for name in files] for files in (clip["dense"]["files"], clip["files"]))
    return Pair(
        own[0].name,
        tuple(twin),
        tuple(own),
        f"{clip['prompt']} (seed {clip['seed']})",
        preset["generate"]["fps"],
        (clip["dense"]["seconds"], clip["seconds"]),
    )


def _clips_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file() and file.suffix.lower() in READABLE}


def _labels(first: Path, second: Path) -> tuple[str, str]:
    """The shortest names that tell two paths apart."""
    for names in ((first.stem, second.stem), (first.name, second.name), (str(first), str(second))):
        if names[0] != names[1]:
            return names
    return "first", "second"  # one path twice


def _told(shape: tuple[int, ...]) -> str:
    frames, height, width, _ = shape
    return f"{frames} frame{'' if frames == 1 else 's'} of {width}x{height}"
