"""Documents cut into blocks, and what in them is a figure that must be traced to a record."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "results"

_NUMBER = r"(?<![\w.-])\d[\d,]*(?:\.\d+)?"
# What was measured comes with a unit: decibels, how many times as fast, seconds, minutes, bytes.
FIGURE = re.compile(
    rf"{_NUMBER}(?: ?(?:dB|ms|s|minutes?|seconds|GB|GiB|MB)\b|x(?![\w.])| times (?:as|faster|slower)\b)"
    rf"|times as fast"
)
UNIT = re.compile(r"\b(?:dB|PSNR|ms|seconds|GB|GiB|MB|as fast|faster)\b")
RECORD = re.compile(r"scripts/results/([\w.-]+)")
# Words that say of a number that it is nobody's record here, or that it is somebody else's.
WITHOUT = re.compile(
    r"\bno record\b|\bnot on record\b|\bnot in a record\b|\bnot measured\b|\b[Pp]ublished\b", re.S
)
# Parts that scripts write. The README's own figures stand between marks too, and are written by hand.
MARK = re.compile(r"<!-- (?!figures)[\w ]+: (begin|end) -->")
# A number that says how far two others are apart is in no record.
CLAIM = re.compile(
    r"(?<![+±-])(?<!± )(?<![\w.])(\d+\.\d+)(x(?![\w.])| times as fast| dB\b(?! ?(?:ahead|worse|nearer|apart)))"
)


@dataclass(frozen=True)
class Block:
    """A paragraph, an item of a list, or a row of a table."""

    line: int
    text: str
    section: str  # what came before it under the same heading
    head: str = ""  # of a row: the first row of its table
    lead: str = ""  # of a row: what stands before its table
    generated: bool = False  # written by a script from a record, between marks

    @property
    def figures(self) -> list[str]:
        """What in it must be traced: numbers with a unit, and a row's numbers where its table's head has the unit."""
        found = [match[0] for match in FIGURE.finditer(_prose(self.text))]
        if not found and UNIT.search(_prose(self.head)) and self.text != self.head:
            found = re.findall(rf"{_NUMBER}(?![\w-])", _prose(self.text))
        return found

    @property
    def claims(self) -> list[tuple[str, str]]:
        """Numbers that a record must have, with their unit, "dB" or "times"."""
        found = CLAIM.findall(_prose(self.text))
        return [(number, "dB" if "dB" in unit else "times") for number, unit in found]

    @property
    def records(self) -> list[str]:
        """The records that it names, and those named before it under its heading."""
        return list(dict.fromkeys(RECORD.findall(self.text) + RECORD.findall(self.section)))

    @property
    def is_without(self) -> bool:
        """Whether it says that its numbers are in no record of ours."""
        return bool(WITHOUT.search(" ".join(f"{self.lead} {self.text}".split())))


def cut(text: str) -> Iterator[Block]:
    """The blocks of a document in Markdown, without its code."""
    section: list[str] = []
    block: list[str] = []
    began, in_code, head, lead, generated = 1, False, "", "", False
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        fence = line.lstrip().startswith("```")
        mark = MARK.match(line)
        starts = not line.strip() or fence or in_code or mark or line.startswith(("#", "- ", "|"))
        if starts and block:
            row = block[0].startswith("|")
            head = (head or block[0]) if row else ""
            yield Block(began, "\n".join(block), "\n".join(section), head, lead if row else "", generated)
            lead = lead if row else "\n".join(block)
            section += block
            block = []
        if mark:
            generated = mark[1] == "begin"
        head = head if line.startswith("|") else ""
        if fence:
            in_code = not in_code
        elif line.startswith("#") and not in_code:
            section = []
        elif line.strip() and not in_code and not mark:
            began = began if block else number
            block.append(line)


def _prose(text: str) -> str:
    """The text without code, links' targets and comments."""
    text = re.sub(r"`[^`]*`|<!--.*?-->", " ", text, flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", text)
