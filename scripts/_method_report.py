"""What a comparison of methods comes to: lines on the terminal, the table of docs/methods.md, and its picture."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from _pages import put_between

LOW_KEEP = 0.25  # up to here a method that looks at the tokens has to beat the lot
# Okabe and Ito's, told apart by colour-blind eyes, and three more; the marks differ, too.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#7A4EA3",
    "#8C564B",
    "#8FA000",
)
_MARKS = "osD^vPX*<>h"
_SHARING = ", one plan for both"  # in names of entries
_LEGEND = (
    "Keep is what was achieved. `over the lot`: PSNR less that of as many blocks drawn by lot, mean over prompts and "
    "standard error; bold where a method that looks at the tokens loses. `change`: temporal change over that of dense. "
    "`right`: prompts whose clip shows all they ask for. `recall`: share of the true attention on the keys read. "
    "Predict, reorder, attend: milliseconds of a sparse step and prompt."
)


@dataclass(frozen=True)
class Gain:
    """PSNR of a method less that of its control, prompt by prompt."""

    mean: float  # dB
    error: float  # standard error of the mean
    prompts: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


class _Point(NamedTuple):
    keep: float
    seconds: float
    psnr: float


def print_table(record: dict) -> None:
    """The figures of every variant, what stayed undone, and what the content-adaptive methods gain over the lot."""
    print(f"\n{describe(record)}")
    head = ("keep", "PSNR dB", "min", "SSIM", "change", "right", "recall")
    head += ("predict ms", "reorder ms", "attend ms", "denoise s")
    print(f"{'variant':52}" + "".join(f"{word:>11}" for word in head))
    for name, told in record["variants"].items():
        cells = row_of(record, name, told)
        print(f"{name:52}" + "".join(f"{cell:>11}" for cell in cells))
    for one in record["unreached"]:
        print(f"{one['method']} cannot keep {one['wanted']:g}; the nearest it can is {one['nearest']:.3f}")
    for one in record["failed"]:
        print(f"{one['method'] or one['dense']} at {one['wanted']} failed: {one['problem']}")
    if record["left"]:
        print(f"there was no time for {len(record['left'])} jobs: {record['left']}")
    print(f"\nPSNR against blocks drawn by lot, content-adaptive methods, keep up to {LOW_KEEP:g}:")
    for name, told in record["variants"].items():
        if told["kind"] != "method" or not told["adaptive"] or told["wanted"] > LOW_KEEP:
            continue
        gain = gain_of(record, told)
        if gain is None:
            print(f"  {name:20} no control, or too few prompts")
            continue
        verdict = (
            "ahead" if gain.mean > 2 * gain.error else "BEHIND" if gain.mean < -2 * gain.error else "level"
        )
        twin = record["variants"][told["control"]]["figures"]["achieved_keep"]
        keeps = f"keep {told['figures']['achieved_keep']:.3f} and {twin:.3f}"
        print(f"  {name:20} {gain} dB over {gain.prompts} prompts, {keeps}: {verdict}")


def row_of(record: dict, name: str, told: dict) -> list[str]:
    """Cells of one variant: keep, PSNR, its minimum, SSIM, temporal change, right, recall, ms of three parts, s."""
    figures = told["figures"]
    right = told["right"]
    recall, parts = (told.get(key) or {} for key in ("recall", "parts"))
    return [
        _cell(figures["achieved_keep"], 3),
        _cell(figures.get("psnr_mean"), 2),
        _cell(figures.get("psnr_min"), 2),
        _cell(figures.get("ssim_mean"), 4),
        _cell(figures.get("flicker_mean"), 3),
        f"{sum(right)}/{len(right)}",
        _cell(recall.get("recall"), 3),
        *(_cell(parts.get(part), 2) for part in ("predict", "reorder", "attend")),
        _cell(figures["denoise_seconds_per_prompt"], 3),
    ]


def gain_of(record: dict, told: dict) -> Gain | None:
    """A method against its control over the prompts both have; None where there are not two of them."""
    twin = record["variants"].get(told.get("control"))
    if twin is None:
        return None
    pairs = [
        (a, b) for a, b in zip(told["psnr"], twin["psnr"], strict=True) if a is not None and b is not None
    ]
    if len(pairs) < 2:
        return None
    apart = [a - b for a, b in pairs]
    return Gain(mean(apart), stdev(apart) / math.sqrt(len(apart)), len(apart))


def write_report(records: list[dict], docs: Path, picture: Path) -> None:
    """Write the table between its markers and draw the picture.

    Raises:
        SystemExit: a page without the markers, or no matplotlib.
    """
    put_between(docs, "methods", "\n\n".join(map(markdown_of, records)))
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(records, picture)
    print(f"wrote {docs} and {picture}")


def describe(record: dict) -> str:
    """What was compared, on what."""
    frames, rows, columns = record["grid"]
    where = (record.get("environment") or record["environments"][0])["chip"]
    clip = f"{record['frames']} frames of {record['size']}x{record['size']}"
    tokens = f"{frames}x{rows}x{columns} = {record['tokens']:,} tokens"
    run = f"{record['prompts']} prompts, {record['steps']} steps, {record['dtype'].removeprefix('torch.')}"
    return f"{record['model']}, {clip}: {tokens}, {run}, {where}"


def markdown_of(record: dict) -> str:
    """A record's table: methods under the keep they were made for, best first, then controls."""
    head = ("keep", "method", "set to", "PSNR dB", "min", "over the lot dB", "SSIM", "change", "right", "recall",
            "predict ms", "reorder ms", "attend ms", "denoise s", "x as fast")  # fmt: skip
    lines = [f"{describe(record)}.", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, told in _in_order(record):
        keep, psnr, least, *rest = row_of(record, name, told)
        gain = gain_of(record, told)
        dense = told.get("dense_seconds", _seconds(record["variants"]["dense"]))
        setting = ", ".join(f"{key} {_shown(value)}" for key, value in (told.get("set") or {}).items())
        if told["kind"] == "random":
            setting = name.partition("(")[2].partition(")")[0]
        title = {"method": told.get("method"), "random": "*by lot*"}.get(told["kind"], f"*{told['kind']}*")
        cells = [
            keep,
            title,
            setting or told.get("setting", ""),
            psnr,
            least,
            "" if gain is None else str(gain),
        ]
        speed = f"{dense / _seconds(told):.2f}"
        lines.append(f"| {' | '.join(['' if cell == '-' else cell for cell in [*cells, *rest, speed]])} |")
    if "note" in record:
        lines += ["", record["note"]]
    for one in record["unreached"]:
        lines += [
            "",
            f"{one['method']} cannot keep {one['wanted']:g}; the nearest it can is {one['nearest']:.3f}.",
        ]
    if record["failed"]:
        lines += ["", f"Ended with an error: {len(record['failed'])} jobs, named in the record."]
    if record["left"]:
        lines += ["", f"Not run for want of time: {len(record['left'])} variants."]
    return "\n".join(lines)


def draw(records: list[dict], path: Path) -> None:
    """PSNR over achieved keep and over denoising time, a row for each record. Controls are dashed."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(records), 2, figsize=(12.5, 5.2 * len(records)), squeeze=False, layout="constrained"
    )
    styles = _styles(records)
    for record, (by_keep, by_time) in zip(records, axes, strict=True):
        _draw_by_keep(record, styles, by_keep)
        _draw_by_time(record, styles, by_time)
        by_keep.set(xlabel="achieved keep (log scale)", ylabel="PSNR against dense, dB", xscale="log")
        wanted = sorted({told["wanted"] for told in record["variants"].values() if "wanted" in told})
        by_keep.set_xticks(wanted, [f"{keep:g}" for keep in wanted])
        by_keep.minorticks_off()
        by_time.set(xlabel="denoising, seconds a prompt", ylabel="PSNR against dense, dB")
        dense = _seconds(record["variants"]["dense"])
        by_time.axvline(dense, color="0.4", linewidth=1, linestyle=":")
        by_time.annotate("dense", (dense, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
                         ha="right", color="0.4")  # fmt: skip
        floors = [
            (told["setting"], told["figures"].get("psnr_mean")) for told in _of_kind(record, "noise floor")
        ]
        for setting, psnr in floors:
            # as a remark, not as a line: it lies far above everything and would press the rest together
            told = "equal to dense" if psnr is None else f"{psnr:.1f} dB"
            by_keep.annotate(f"dense by another kernel ({setting}): {told}", (0.02, 0.97), va="top", fontsize=8,
                             xycoords="axes fraction", color="0.4")  # fmt: skip
        for axis in (by_keep, by_time):
            axis.grid(alpha=0.25)
            axis.set_title(_title(record), fontsize=9)
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    part = path.with_name(f".{path.name}.part.png")
    figure.savefig(part, dpi=110)
    os.replace(part, path)
    pyplot.close(figure)


def _draw_by_keep(record: dict, styles: dict[str, dict], axis: Any) -> None:
    for title, points in _lines(record).items():
        if title != "fewer steps":
            axis.plot([p.keep for p in points], [p.psnr for p in points], label=title, **styles[title])


def _draw_by_time(record: dict, styles: dict[str, dict], axis: Any) -> None:
    """Without blocks drawn by lot: they are drawn on the CPU, which says nothing about time."""
    lines = {title: points for title, points in _lines(record).items() if not title.startswith("by lot")}
    for title, points in lines.items():
        axis.plot([p.seconds for p in points], [p.psnr for p in points], label=title, **styles[title])
    # Nothing is both faster and nearer to dense than what lies on this line.
    best: list[_Point] = []
    for point in sorted(itertools.chain(*lines.values()), key=lambda p: (p.seconds, -p.psnr)):
        if not best or point.psnr > best[-1].psnr:
            best.append(point)
    frontier = {"color": "0.85", "linewidth": 5, "zorder": 0, "label": "best for its time"}
    axis.step([p.seconds for p in best], [p.psnr for p in best], where="post", **frontier)


def _lines(record: dict) -> dict[str, list[_Point]]:
    """Methods by name, then their controls: blocks drawn by lot, a line for each token order, and fewer steps.

    Of variations only those that share their plans are drawn: with all of them nobody could tell the lines apart.
    """
    drawn = {name: told for name, told in record["variants"].items() if _is_drawn(told)}
    controls = {told["control"] for told in drawn.values() if told["kind"] == "method"}
    groups: dict[tuple[int, str], list[_Point]] = {}
    for name, told in drawn.items():
        place = {
            "method": (0, told.get("method")),
            "random": (1, name.partition("@")[0].replace("random", "by lot")),
            "fewer steps": (2, "fewer steps"),
        }.get(told["kind"])
        psnr = told["figures"].get("psnr_mean")  # None: equal to dense
        if told["kind"] == "random" and name not in controls:
            continue
        if place and psnr is not None:
            point = _Point(told["figures"]["achieved_keep"] or 0.0, _seconds(told), psnr)
            groups.setdefault(place, []).append(point)
    return {
        title: sorted(groups[kind, title], key=lambda p: (p.keep, p.seconds))
        for kind, title in sorted(groups)
    }


def _is_drawn(told: dict) -> bool:
    return told["kind"] != "method" or told["method"] in (told["options"]["method"], _sharing(told))


def _sharing(told: dict) -> str:
    return f"{told['options']['method']}{_SHARING}"


def _styles(records: list[dict]) -> dict[str, dict]:
    titles = list(dict.fromkeys(title for record in records for title in _lines(record)))
    methods = [title for title in titles if not title.startswith("by lot") and title != "fewer steps"]
    plain = sorted({title.removesuffix(_SHARING) for title in methods})
    styles = {
        title: {"color": _COLOURS[n % len(_COLOURS)], "marker": _MARKS[n % len(_MARKS)]}
        for n, title in enumerate(plain)
    }
    for title in methods:
        if title.endswith(_SHARING):
            hollow = {"markerfacecolor": "white", "linestyle": ":"}
            styles[title] = {**styles[title.removesuffix(_SHARING)], **hollow}
    lots = [title for title in titles if title.startswith("by lot")]
    for n, title in enumerate(lots):
        grey = str(0.35 + 0.4 * n / max(len(lots) - 1, 1))
        styles[title] = {"color": grey, "marker": _MARKS[n % len(_MARKS)], "linestyle": "--", "linewidth": 1}
    styles["fewer steps"] = {"color": "#B00000", "marker": ".", "linestyle": "--"}
    return {title: {"markersize": 5, **style} for title, style in styles.items()}


def _in_order(record: dict) -> list[tuple[str, dict]]:
    def place(item: tuple[str, dict]) -> tuple:
        told = item[1]
        psnr = told["figures"].get("psnr_mean")
        return -told.get("wanted", -1), -(psnr if psnr is not None else math.inf)

    return sorted(record["variants"].items(), key=place)


def _of_kind(record: dict, kind: str) -> list[dict]:
    return [told for told in record["variants"].values() if told["kind"] == kind]


def _seconds(told: dict) -> float:
    return told["figures"]["denoise_seconds_per_prompt"]


def _title(record: dict) -> str:
    return f"{record['model']}, {record['tokens']:,} tokens, {record['prompts']} prompts"


def _shown_gain(gain: Gain | None, told: dict) -> str:
    if gain is None:
        return ""
    lost = gain.mean < 0 and told["adaptive"] and told["wanted"] <= LOW_KEEP
    return f"**{gain}**" if lost else str(gain)


def _shown(value: Any) -> str:
    return (
        "x".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
