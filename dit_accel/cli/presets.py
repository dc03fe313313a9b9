"""`dit-accel presets`: what can be asked for, how two differ, and whether a file is sound. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli.request import show as show_value
from dit_accel.cli.terminal import complain, remark, tables
from dit_accel.errors import UsageError
from dit_accel.preset import Preset, examine, load_preset, resolve
from dit_accel.preset_files import SHIPPED, PresetFile, read_preset_file, read_shelf, read_shipped

app = typer.Typer(help="List the presets, show one, tell two apart, or check a file of them.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Named = Annotated[str, typer.Argument(help="A name, FILE.toml or FILE.toml#NAME.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """Every preset that can be asked for by name: shipped, of this folder, of the configuration folder."""
    presets, problems = _read_all()
    if as_json:
        told = ("name", "description", "pipeline", "model", "level", "status", "origin")
        print(json.dumps([{key: getattr(preset, key) for key in told} for preset in presets], indent=2))
    else:
        heads = ("preset", "level", "status", "from", "model", "what it is")
        _print(
            heads,
            [(p.name, p.level or "not said", p.status, p.origin, p.model, p.description) for p in presets],
        )
    for problem in problems:
        remark(f"left out: {problem}")


def _read_all() -> tuple[list[Preset], list[str]]:
    """Every preset with a name of its own, and a line about each of the user's that could not be taken in."""
    shelf = read_shelf()
    presets = [resolve(name, PresetFile(SHIPPED, shelf.shipped), shelf.shipped) for name in sorted(shelf.shipped)]
    problems = [*map(str, shelf.unread), *map(str, shelf.clashes.values())]
    for file in shelf.users:
        for name in file.tables:
            if name in shelf.clashes or shelf.holder(name) is not file:
                continue  # told above, or a copy of one that is listed
            preset, mistakes = examine(name, file, shelf.shipped)
            if preset is None:
                problems.append(f"{file.origin}#{name}: {mistakes[0]}")
            else:
                presets.append(preset)
    return presets, problems


@app.command("show")
def show(preset: Named, as_json: AsJson = False) -> None:
    """Every value of a preset, where it comes from, and what its figures rest on."""
    chosen = load_preset(preset)
    told = chosen.to_dict()
    if as_json:
        print(json.dumps(told, indent=2))
        return
    rows = [("description", chosen.description, chosen.sources.get("description", "default"))]
    rows += [(name, show_value(value), source) for name, value, source in chosen.rows()]
    rows += [(f"provenance.{name}", show_value(value), f"preset {chosen.name}") for name, value in _claimed(chosen)]
    title = f"{chosen.name} ({chosen.status}, level {chosen.level or 'not said'}, from {chosen.origin})"
    _print(("value", "set to", "source"), rows, title)


def _claimed(preset: Preset) -> list[tuple[str, Any]]:
    if preset.provenance is None:
        return []
    rows = list(preset.provenance.to_mapping().items())[:-1]
    return rows + [
        (f"figures.{name}", f"{figure.value:g} ({figure.record})") for name, figure in preset.provenance.figures.items()
    ]


@app.command("diff")
def diff(first: Named, second: Named, as_json: AsJson = False) -> None:
    """The values in which two presets differ, and where each has it from.

    What only one of them has by default (the options of a part that the other is without) is not told.
    """
    a, b = load_preset(first), load_preset(second)
    differences = compare(a, b)
    if as_json:
        print(json.dumps({"a": a.name, "b": b.name, "differences": differences}, indent=2))
        return
    if not differences:
        print(f"{a.name} and {b.name} have the same values")
        return
    cells = [
        (row["value"], *_side(row["a"], row["source_a"]), *_side(row["b"], row["source_b"])) for row in differences
    ]
    _print(("value", a.name, "source", b.name, "source"), cells)


def _side(value: Any, source: str | None) -> tuple[str, str]:
    return ("absent", "") if source is None else (show_value(value), source)


def compare(a: Preset, b: Preset) -> list[dict[str, Any]]:
    """Rows of `value`, `a`, `source_a`, `b`, `source_b`; a source of None: that preset has no such value."""
    sides = [{name: (value, source) for name, value, source in _told(preset)} for preset in (a, b)]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        (left, from_left), (right, from_right) = (side.get(name, (None, None)) for side in sides)
        both = from_left is not None and from_right is not None
        if (left != right) if both else "default" not in (from_left, from_right):
            rows.append({"value": name, "a": left, "source_a": from_left, "b": right, "source_b": from_right})
    return rows


def _told(preset: Preset) -> list[tuple[str, Any, str]]:
    claims = [(key, getattr(preset, key), preset.sources[key]) for key in ("level", "status")]
    return [*claims, *preset.rows()]


def _print(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout, of texts that may look like rich's markup and are none."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(*map(escape, heads), title=None if title is None else escape(title), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    tables().print(table)


@app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(help="TOML files of presets.")], as_json: AsJson = False
) -> int:
    """Read every preset of every file; a line on stderr for each mistake, and exit code 2 then."""
    shipped = read_shipped()
    verdicts = [verdict for file in files for verdict in _check(file.expanduser(), shipped)]
    if as_json:
        print(json.dumps(verdicts, indent=2))
    for verdict in verdicts:
        place = verdict["file"] if verdict["preset"] is None else f"{verdict['file']}#{verdict['preset']}"
        if verdict["error"] is not None:
            complain(verdict["error"] if verdict["preset"] is None else f"{place}: {verdict['error']}")
        elif not as_json:
            print(f"{place}: sound")
    return UsageError.exit_code if any(verdict["error"] for verdict in verdicts) else 0


def _check(path: Path, shipped: Any) -> list[dict[str, str | None]]:
    try:
        file = read_preset_file(path)
    except UsageError as error:
        return [{"file": str(path), "preset": None, "error": str(error)}]
    if not file.tables:
        return [{"file": str(path), "preset": None, "error": f"preset file {path} holds no preset; write one: [NAME]"}]
    mistakes = {name: examine(name, file, shipped)[1] for name in file.tables}
    return [
        {"file": str(path), "preset": name, "error": None if error is None else str(error)}
        for name, errors in mistakes.items()
        for error in errors or [None]
    ]
