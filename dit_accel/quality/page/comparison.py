"""The page of `dit-accel compare`: the clips and how far apart they are, without any times but those on record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dit_accel.quality.page.clips import Take, name_clip, show_clip
from dit_accel.quality.page.model import Fact, Page, Section, ShownClip, Table
from dit_accel.quality.page.render import save
from dit_accel.quality.pairs import Compared

MOST = 12  # clips embedded in one page; more would make it too heavy to open


def write_comparison(
    compared: Sequence[Compared],
    labels: tuple[str, str],
    path: Path,
    *,
    raw: dict[str, Any],
    left_out: Sequence[str] = (),
) -> None:
    """Write one HTML file that needs nothing beside it.

    Args:
        compared: at least one.
        labels: of the reference and of the other.
        raw: what `--json` prints, for download.
        left_out: files without a counterpart.
    """
    ordered = sorted(compared, key=_worst)
    points = [("LPIPS", reason) for reason in _reasons(compared)]
    points += [(name, "in one of the two folders only") for name in left_out]
    sections = [Section("all", "All clips", tables=(_table(ordered, labels),))]
    if points:
        sections.append(Section("not-run", "What was not measured, and why", points=tuple(points)))
    shown = tuple(_show(n, one, labels) for n, one in enumerate(ordered[:MOST]))
    page = Page(
        title=f"{labels[1]} against {labels[0]}",
        verdict=judge(compared, labels),
        warnings=(),
        facts=_facts(compared, ordered[0], labels),
        before=(),
        clips=shown,
        clips_note=_note(shown, len(ordered), labels),
        after=tuple(sections),
        raw=json.dumps(raw, indent=1),
        raw_name="compare.json",
    )
    save(page, path)


def judge(compared: Sequence[Compared], labels: tuple[str, str]) -> str:
    """The outcome in one sentence."""
    apart = [one for one in compared if one.quality.psnr_db is not None]
    clips = "the clip" if len(compared) == 1 else f"all {len(compared)} clips"
    if not apart:
        return f"{labels[1]} equals {labels[0]} in {clips}, pixel for pixel."
    worst = min(apart, key=_worst)
    q, name = worst.quality, worst.pair.name
    low = f"{q.worst_psnr_db:.1f} dB in the worst "
    low += f"frame ({q.worst_frame} of {name})" if worst.size[0] > 1 else f"one ({name})"
    average = f"{mean(one.quality.psnr_db for one in apart):.1f} dB"
    if len(compared) == 1:
        return f"PSNR of {labels[1]} to {labels[0]}: {average}" + (f", {low}." if worst.size[0] > 1 else ".")
    equal, many = len(compared) - len(apart), f"{len(apart)} clip{'s' * (len(apart) > 1)}"
    if equal:
        many = f"the {many} that differ{'s' * (len(apart) == 1)} ({equal} {'is' if equal == 1 else 'are'} equal)"
    return f"PSNR of {labels[1]} to {labels[0]}: {average} on average over {many}, {low}."


def _worst(one: Compared) -> float:
    worst = one.quality.worst_psnr_db
    return float("inf") if worst is None else worst


def _show(number: int, one: Compared, labels: tuple[str, str]) -> ShownClip:
    pair = one.pair
    notes = ("", "") if pair.seconds is None else tuple(f"{seconds:.1f} s" for seconds in pair.seconds)
    takes = (
        Take(labels[0], pair.reference, None, notes[0]),
        Take(labels[1], pair.other, one.quality, notes[1]),
    )
    name = name_clip(pair.name, one.quality, one.size[0])
    return show_clip(f"clip-{number}", name, pair.told or pair.name, takes, pair.fps)


def _note(shown: Sequence[ShownClip], of: int, labels: tuple[str, str]) -> str:
    told = ["The worst clip comes first."] * (of > 1)
    told += [f"The {len(shown)} worst of {of} are in this page."] * (len(shown) < of)
    told += ["Players open at the worst frame."] * any(clip.frames > 1 for clip in shown)
    return " ".join([*told, f"The last picture is the difference of {labels[1]} from {labels[0]}, amplified."])


def _facts(compared: Sequence[Compared], worst: Compared, labels: tuple[str, str]) -> tuple[Fact, ...]:
    q = worst.quality
    apart = [one.quality.psnr_db for one in compared if one.quality.psnr_db is not None]
    likeness = [one.quality.ssim for one in compared if one.quality.ssim is not None]
    lively = [one.quality.flicker for one in compared if one.quality.flicker is not None]
    low = "equal" if q.worst_psnr_db is None else f"{q.worst_psnr_db:.1f} dB"
    left = "; equal clips are left out of the mean" if len(apart) < len(compared) else ""
    facts = [
        Fact("PSNR", f"{mean(apart):.1f} dB" if apart else "equal", f"higher is nearer{left}"),
        Fact("Worst frame", low, f"frame {q.worst_frame} of {worst.pair.name}")
        if worst.size[0] > 1
        else Fact("Worst image", low, worst.pair.name),
    ]
    if likeness:
        facts.append(Fact("SSIM", f"{mean(likeness):.3f}", "1 is equal"))
    if lively:
        note = f"of {labels[0]}'s; more than 1 is flicker, less is motion lost"
        facts.append(Fact("Temporal change", f"{mean(lively):.2f} ×", note))
    return tuple(facts)


def _table(compared: Sequence[Compared], labels: tuple[str, str]) -> Table:
    rows = []
    for one in compared:
        frames, height, width = one.size
        rows.append((one.pair.name, f"{frames} × {width}x{height}", *figures(one)))
        if one.pair.seconds is not None:
            rows[-1] += tuple(f"{seconds:.1f}" for seconds in one.pair.seconds)
    columns = ("clip", "frames", *FIGURES)
    if any(one.pair.seconds is not None for one in compared):
        columns += tuple(f"{label}, s" for label in labels)
    return Table("Each clip, the worst first", columns, tuple(rows))


FIGURES = ("PSNR, dB", "worst frame", "at, dB", "SSIM", "temporal change", "LPIPS")


def figures(one: Compared) -> tuple[str, ...]:
    """A pair's distances as texts, under the headings `FIGURES`."""
    q = one.quality

    def told(value: float | None, form: str, none: str) -> str:
        return none if value is None else format(value, form)

    return (
        told(q.psnr_db, ".2f", "equal"),
        "–" if one.size[0] == 1 else str(q.worst_frame),
        told(q.worst_psnr_db, ".2f", "equal"),
        told(q.ssim, ".4f", "frames too small"),
        told(q.flicker, ".3f", "–"),
        told(q.lpips, ".4f", "not run"),
    )


def _reasons(compared: Sequence[Compared]) -> list[str]:
    return sorted({one.quality.lpips_missing for one in compared if one.quality.lpips_missing})
