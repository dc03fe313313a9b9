"""What a page shows, as plain data: facts, tables, charts and clips. The template lays it out and knows no more."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """A table of texts. The first column of every row names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False  # long, and of interest to few: opened on demand


@dataclass(frozen=True)
class Chart:
    """A drawing, what it says in words, and its numbers."""

    title: str
    svg: Markup
    alt: str  # for those who do not see it
    table: Table
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture inside the page."""

    title: str
    uri: str
    alt: str


@dataclass(frozen=True)
class Fact:
    """One number that stands out at the top."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    key: str  # its anchor
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    pictures: tuple[Picture, ...] = ()
    points: tuple[tuple[str, str], ...] = ()  # what, and why or what of it
    code: str = ""  # a command, word for word


@dataclass(frozen=True)
class Moving:
    """A video or image inside the page."""

    label: str
    note: str
    uri: str
    poster: str  # its worst frame; empty for an image
    width: int
    height: int
    legend: str = ""  # a style sheet's gradient, where colours stand for numbers
    ends: tuple[str, str] = ("", "")  # what its two ends stand for


@dataclass(frozen=True)
class ShownClip:
    """One prompt as every variant drew it, side by side."""

    name: str  # in the chooser
    told: str  # what was asked for
    frames: int
    fps: float
    worst_frame: int
    players: tuple[Moving, ...]
    table: Table
    chart: Chart | None  # None for images, and for clips that are equal throughout


@dataclass(frozen=True)
class Page:
    """All of it, in a reader's order."""

    title: str
    verdict: str
    warnings: tuple[str, ...]
    facts: tuple[Fact, ...]
    before: tuple[Section, ...]  # the clips
    clips: tuple[ShownClip, ...]  # the worst first
    clips_note: str
    after: tuple[Section, ...]
    raw: str  # JSON, for download
    raw_name: str
