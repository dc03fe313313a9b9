"""The page's charts, each with its description and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_accel.quality.page.drawing import (
    DASHES,
    HATCHES,
    INK,
    MARKERS,
    PAPER,
    SERIES,
    TEXT,
    drawing,
    finish,
)
from dit_accel.quality.page.model import Chart, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 430, 270  # of a chart that takes half a wide page, and all of a telephone's


@dataclass(frozen=True)
class Point:
    """A variant in the plane of time and likeness."""

    name: str
    seconds: float
    psnr_db: float
    kind: str  # points of one kind share shape and colour
    joined: bool = False  # by a line with the others of its kind


def draw_frames(key: str, values: Mapping[str, Sequence[float | None]], worst: tuple[str, int]) -> Chart | None:
    """PSNR of every frame of one clip, the worst marked; None where all frames are equal to the reference's.

    Args:
        key: the chart's name on the page.
        values: for each variant, dB of each frame; None where a frame is equal to the reference's.
        worst: of which variant, which frame.
    """
    drawn = {name: row for name, row in values.items() if any(v is not None for v in row)}
    if not drawn:
        return None
    frames = max(map(len, drawn.values()))
    name, frame = worst
    low = drawn[name][frame] if name in drawn else None
    alt = f"Line chart: PSNR in dB of each of {frames} frames, for {_listed(drawn)}."
    if low is not None:
        alt += f" The lowest point of {name} is {low:.1f} dB at frame {frame}."
    with drawing(_WIDTH, _HEIGHT) as (figure, axes):
        for i, (label, row) in enumerate(drawn.items()):
            points = [math.nan if v is None else v for v in row]
            every = max(1, frames // 12)
            axes.plot(
                range(len(points)), points, color=SERIES[i + 1], linestyle=DASHES[i], linewidth=2,
                marker=MARKERS[i], markersize=5, markevery=every, label=label,
            )  # fmt: skip
        if low is not None:
            axes.plot([frame], [low], "o", markersize=13, fillstyle="none", color=INK, markeredgewidth=1.8)
            right = frame > frames / 2
            axes.annotate(
                f"worst: frame {frame}, {low:.1f} dB", (frame, low), xytext=(-12 if right else 12, -3),
                textcoords="offset points", ha="right" if right else "left", va="top",
            )  # fmt: skip
        axes.margins(x=0.04, y=0.18)
        axes.set(xlabel="frame", ylabel="PSNR, dB")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        if len(drawn) > 1:
            _legend_above(figure, min(2, len(drawn)))
        svg = finish(figure, key, alt)
    rows = tuple(
        (str(n), *(_decibel(row[n]) if n < len(row) else "" for row in values.values())) for n in range(frames)
    )
    table = Table("PSNR of every frame, dB", ("frame", *values), rows)
    gaps = any(v is None for row in values.values() for v in row)
    note = "Gaps are frames equal to the reference's, whose PSNR is infinite." if gaps else ""
    return Chart("PSNR of every frame", svg, alt, table, note)


def draw_pareto(points: Sequence[Point], dense_seconds: float | None, floor_db: float | None) -> Chart:
    """Time against likeness to dense; up and to the left is better.

    Args:
        points: what to draw, at least one.
        dense_seconds: where dense itself stands: infinitely like itself, so it is a line.
        floor_db: PSNR of dense against dense with another kernel; above it nothing can be told apart.
    """
    alt = "Scatter plot: seconds against mean PSNR in dB. " + "; ".join(
        f"{p.name} {p.seconds:.3g} s, {p.psnr_db:.1f} dB" for p in points
    )
    kinds = list(dict.fromkeys(point.kind for point in points))
    # A floor far above would press everything else flat.
    near = floor_db is not None and floor_db <= max(p.psnr_db for p in points) + 10
    with drawing(_WIDTH, _HEIGHT + 40) as (figure, axes):
        for i, kind in enumerate(kinds, start=1):
            mine = sorted((p for p in points if p.kind == kind), key=lambda p: p.seconds)
            line = DASHES[1] if all(p.joined for p in mine) else "none"
            axes.plot(
                [p.seconds for p in mine], [p.psnr_db for p in mine], linestyle=line, linewidth=1.4,
                marker=MARKERS[i - 1], markersize=9, color=SERIES[i], label=kind,
            )  # fmt: skip
        middle = max([dense_seconds or 0, *(p.seconds for p in points)]) / 2
        for point in points:
            left = point.seconds > middle
            axes.annotate(
                point.name, (point.seconds, point.psnr_db), xytext=(-9 if left else 9, 5),
                textcoords="offset points", ha="right" if left else "left", fontsize=TEXT - 2,
            )  # fmt: skip
        if dense_seconds is not None:
            axes.axvline(dense_seconds, color=INK, linestyle=":", linewidth=1.4, label="dense's time")
        if near:
            axes.axhline(floor_db, color=INK, linestyle="--", linewidth=1, label="noise floor")
        axes.margins(0.12, 0.2)
        axes.set_xlim(left=0)
        low, high = axes.get_ylim()
        spare = max(0.0, 2.0 - (high - low)) / 2  # a hundredth of a decibel is not to look like a cliff
        axes.set_ylim(low - spare, high + spare)
        axes.set(xlabel="seconds a generation (less is better)", ylabel="PSNR to dense, dB")
        axes.grid()
        _legend_above(figure, 2)
        svg = finish(figure, "pareto", alt)
    rows = tuple((p.name, p.kind, f"{p.seconds:.3g}", f"{p.psnr_db:.1f}") for p in points)
    table = Table("Time and likeness", ("variant", "kind", "seconds", "PSNR, dB"), rows)
    note = "Mean over the clips. Up and to the left is better; dense itself would be infinitely high."
    if floor_db is not None and not near:
        note += f" The noise floor is far above, at {floor_db:.1f} dB."
    return Chart("Time against likeness", svg, alt, table, note)


def draw_breakdown(parts: Mapping[str, Mapping[str, float]]) -> Chart:
    """Seconds of each part of a generation, stacked, a bar for each variant.

    Args:
        parts: variant -> part -> seconds, with equal parts in all.
    """
    names = list(next(iter(parts.values())))
    told = (
        f"{name} {sum(row.values()):.3g} s, of which attention {row['attention']:.3g} s"
        for name, row in parts.items()
    )
    alt = "Stacked bars: seconds of each part of a generation. " + "; ".join(told)
    with drawing(_WIDTH, 130 + 44 * len(parts)) as (figure, axes):
        place = range(len(parts))
        start = [0.0] * len(parts)
        for i, name in enumerate(names):
            widths = [row[name] for row in parts.values()]
            axes.barh(
                place, widths, left=start, height=0.6, color=SERIES[(i + 1) % len(SERIES)], hatch=HATCHES[i],
                edgecolor=PAPER, linewidth=1, label=name,
            )  # fmt: skip
            start = [a + b for a, b in zip(start, widths, strict=True)]
        for y, total in zip(place, start, strict=True):
            axes.annotate(f"{total:.3g} s", (total, y), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_yticks(place, [_short(name) for name in parts])
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_xlabel("seconds")
        axes.tick_params(axis="y", length=0)
        _legend_above(figure, 2)
        svg = finish(figure, "breakdown", alt)
    rows = tuple((name, *(f"{row[part]:.3g}" for part in names)) for name, row in parts.items())
    table = Table("Seconds of each part", ("variant", *names), rows)
    note = "Shares measured in a run of their own with clocks around every part; the timed runs have none."
    return Chart("Where the time goes", svg, alt, table, note)


def draw_keep(key: str, title: str, axis: str, keep: Mapping[int, float], count: int, skipped: frozenset[int]) -> Chart:
    """Share of the keys that is read, a bar for each layer or step.

    Args:
        key: the chart's name on the page.
        axis: "layer" or "step".
        keep: by number, 0 to 1; those without ran dense, linear or not at all.
        count: how many there are.
        skipped: steps at which the transformer was not run.
    """
    shares = [keep.get(n, math.nan) for n in range(count)]
    known = [share for share in shares if not math.isnan(share)]
    spread = f"from {min(known):.0%} to {max(known):.0%}" if known else "none"
    alt = f"Bars: share of the keys read at each {axis}, {spread}; {count - len(known)} of {count} without one."
    if skipped:
        alt += f" Skipped by the cache: {_listed(map(str, sorted(skipped)))}."
    with drawing(_WIDTH, 210) as (figure, axes):
        axes.bar(range(count), [0 if math.isnan(s) else 100 * s for s in shares], width=0.86, color=SERIES[1])
        for n, share in enumerate(shares):
            if n in skipped:
                axes.plot([n], [4], marker="x", color=INK, markersize=7, markeredgewidth=1.8)
            elif math.isnan(share):
                axes.bar([n], [100], width=0.86, facecolor="none", edgecolor=SERIES[0], hatch="////", linewidth=0.8)
        axes.set_ylim(0, 100)
        axes.set_xlim(-0.7, count - 0.3)
        axes.set(xlabel=axis, ylabel="keys read, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        svg = finish(figure, key, alt)

    def told(n: int) -> str:
        if n in skipped:
            return "skipped by the cache"
        return "dense or linear" if math.isnan(shares[n]) else f"{shares[n]:.1%}"

    table = Table(f"Keys read at each {axis}", (axis, "keys read"), tuple((str(n), told(n)) for n in range(count)))
    marks = ["hatched: ran dense or linear"] * any(math.isnan(s) and n not in skipped for n, s in enumerate(shares))
    marks += ["×: skipped by the cache"] * bool(skipped)
    return Chart(title, svg, alt, table, "; ".join(marks).capitalize())


def _legend_above(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside upper left", ncols=columns, borderaxespad=0.3, columnspacing=1.4, handlelength=2.2)


def _short(name: str) -> str:
    """In two lines where it is long."""
    if len(name) <= 14:
        return name
    cut = next((i for i in range(len(name) // 2, len(name)) if name[i] in " -_,"), len(name) // 2)
    return f"{name[: cut + 1].rstrip()}\n{name[cut + 1 :].lstrip()}"


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.2f}"


def _listed(names: object) -> str:
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
