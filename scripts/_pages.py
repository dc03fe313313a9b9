"""Tables in pages of the documentation, between two marks; and files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path


def marks_of(what: str) -> tuple[str, str]:
    """The lines between which a table stands."""
    return f"<!-- {what}: begin -->", f"<!-- {what}: end -->"


def put_between(page: Path, what: str, text: str) -> None:
    """Replace what stands between a page's marks.

    Raises:
        SystemExit: a page without the marks.
    """
    begin, end = marks_of(what)
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise SystemExit(f"{page}: put the lines {begin} and {end} where the table shall stand")
    write_text(page, f"{old.split(begin)[0]}{begin}\n{text}\n{end}{old.split(end)[1]}")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
