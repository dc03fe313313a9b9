"""`dit-accel compare`: how far apart two clips are, in figures and as a page with both side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli import options
from dit_accel.cli.terminal import remark, tables
from dit_accel.errors import UsageError
from dit_accel.quality.pairs import Pairs, compare_pair, find_pairs

if TYPE_CHECKING:
    from dit_accel.quality.pairs import Compared


def compare(
    first: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="The reference: a video, an image, a folder of them, or run.json alone."
        ),
    ],
    second: Annotated[
        Path | None,
        typer.Argument(metavar="[B]", help="What is measured against it: the same.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the page: FILE.html, or a folder for index.html (needs matplotlib).", show_default=False
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="What to call the two, as dense,fast (default: their names).", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON on stdout.")] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure clips against a reference: PSNR, SSIM, temporal change and the worst frame of each.

    A and B are two videos or images, two folders of clips with equal names, or A is the run.json of
    generate --compare-dense. With --out also a page with both side by side, which opens in any browser.
    """
    pairs = find_pairs(first, second)
    names = _names(labels) if labels is not None else pairs.labels
    page = None if out is None else _place(out.expanduser())
    if pairs.left_out:
        remark(f"note: in one folder only, left out: {', '.join(pairs.left_out)}", quiet=quiet)
    compared = _measure(pairs, quiet)
    told = _tell(compared, names, pairs, page)
    if page is not None:
        from dit_accel.quality.page.comparison import write_comparison

        write_comparison(compared, names, page, raw=told, left_out=pairs.left_out)
    if as_json:
        print(json.dumps(told, indent=2))
        return
    _show(compared, names, quiet)
    if page is not None:
        print(page)


def _place(out: Path) -> Path:
    """The page's file; an error, before the work starts, if it could not be drawn or written."""
    from dit_accel.quality.page.drawing import check_drawable
    from dit_accel.quality.page.place import place_page

    check_drawable()
    return place_page(out)


def _names(labels: str) -> tuple[str, str]:
    names = [name.strip() for name in labels.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise UsageError(f"--labels {labels!r}: give two different names with a comma between, as dense,fast")
    return names[0], names[1]


def _measure(pairs: Pairs, quiet: bool) -> list[Compared]:
    import sys

    from tqdm import tqdm

    from dit_accel.quality.perceptual import open_lpips

    lpips = open_lpips()
    silent = quiet or not sys.stderr.isatty() or len(pairs.pairs) == 1
    bar = tqdm(pairs.pairs, unit="clip", file=sys.stderr, leave=False, dynamic_ncols=True, disable=silent)
    return [compare_pair(pair, lpips) for pair in bar]


def _tell(
    compared: Sequence[Compared], names: tuple[str, str], pairs: Pairs, page: Path | None
) -> dict[str, Any]:
    return {
        "tool": "dit_accel compare",
        "labels": list(names),
        "clips": [
            {
                "name": one.pair.name,
                "told": one.pair.told,
                "files": [[str(file) for file in side] for side in (one.pair.reference, one.pair.other)],
                "frames": list(one.size),
                "seconds": None if one.pair.seconds is None else list(one.pair.seconds),
                **asdict(one.quality),
            }
            for one in compared
        ],
        "left_out": list(pairs.left_out),
        "page": None if page is None else str(page),
    }


def _show(compared: Sequence[Compared], names: tuple[str, str], quiet: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from dit_accel.quality.page.comparison import FIGURES, figures, judge

    table = Table("clip", *FIGURES, title=f"{escape(names[1])} against {escape(names[0])}", title_justify="left")
    for one in compared:
        table.add_row(escape(one.pair.name), *figures(one))
    tables().print(table)
    for reason in sorted({one.quality.lpips_missing for one in compared if one.quality.lpips_missing}):
        remark(f"LPIPS {reason}", quiet=quiet)
    print(judge(compared, names))
