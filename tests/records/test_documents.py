"""Numbers in the README and the documents come from records that are committed, or say that they do not.

Two rules. What was measured (a number with dB, x, "times as fast", a time or bytes, or a row of a table whose head has
one of them) stands with a link to a record, in its own paragraph or row or before it under the same heading, or with
the words that it is in no record, not measured, or published by others. And each PSNR and each ratio of times that
is told to a decimal is a number of those records, rounded; parts between marks, which scripts write from the records,
are left to the scripts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from documents import ROOT, Block, cut
from records import RESULTS, claimable, committed, is_rounded, read_record

DOCUMENTS = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}

# (document, figure): why no record has it.
NOT_MEASURED = {
    ("cli.md", "10 ms"): "what the format GIF rounds to",
    ("tiny-flux.md", "8.7 MB"): "the size of files that ship",
    ("tiny-hunyuan.md", "7.0 MB"): "the size of files that ship",
    ("tiny-sd3.md", "9.1 MB"): "the size of files that ship",
    ("tiny-wan.md", "20 MB"): "the size of files that ship",
    ("tiny-wan.md", "4x"): "what the autoencoder is built to do",
    ("tiny-wan.md", "2x"): "what the autoencoder is built to do",
}
DERIVED = {
    ("region.md", "20.6"): "interpolated between 14 and 10 steps of the record, at as many tokens",
}


def blocks(name: str) -> list[Block]:
    return list(cut(DOCUMENTS[name].read_text(encoding="utf-8")))


def untraced(name: str, found: list[Block]) -> list[str]:
    """The figures that stand with no record."""
    return [
        f"{name}:{block.line}: {figure}: no record is named with it (scripts/results/...), nor that there is none"
        for block in found
        if not block.records and not block.is_without
        for figure in block.figures
        if (name, figure) not in NOT_MEASURED
    ]


def untrue(name: str, found: list[Block]) -> list[str]:
    """The PSNRs and ratios that the records named with them do not have."""
    return [
        f"{name}:{block.line}: {number} ({unit}) is in none of {', '.join(block.records)}"
        for block in found
        if not block.generated and not block.is_without
        for number, unit in block.claims
        if (name, number) not in DERIVED
        and not any(
            is_rounded(number, value) for record in block.records for value in _claimable(record, unit)
        )
    ]


def _claimable(record: str, unit: str) -> list[float]:
    return claimable(read_record(record), unit) if record.endswith(".json") else []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_figure_stands_with_its_record(name: str) -> None:
    assert not untraced(name, blocks(name))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_psnr_and_every_ratio_is_the_records(name: str) -> None:
    assert not untrue(name, blocks(name))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_records_that_are_named_are_committed(name: str) -> None:
    kept = committed()
    named = {record for block in blocks(name) for record in block.records}
    assert named <= kept, named - kept


def test_exceptions_are_needed() -> None:
    for name, figure in NOT_MEASURED:
        assert any(figure in block.figures and not block.records for block in blocks(name)), (name, figure)
    for name, number in DERIVED:
        assert any(number in dict(block.claims) for block in blocks(name)), (name, number)


def test_enough_is_looked_at() -> None:
    """The rules cannot pass by finding nothing."""
    figures = sum(len(block.figures) for name in DOCUMENTS for block in blocks(name))
    claims = sum(len(block.claims) for name in DOCUMENTS for block in blocks(name) if not block.generated)
    print(f"{figures} figures stand with a record, {claims} PSNRs and ratios are looked up")
    assert figures > 300 and claims > 60


RECORD = "[record](scripts/results/tiny_wan_time_cpu.json)"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("A clip is 1.44 times as fast.", "1.44 times as"),
        (f"# One\n{RECORD}\n# Two\nIt takes 3 s.", "3 s"),
        ("| a | seconds |\n| --- | --- |\n| dense | 59 |", "59"),
        ("It needs 3 GB.\n\nAnother paragraph, in no record.", "3 GB"),
        (f"It takes 3 s.\n\nThe record comes too late: {RECORD}.", "3 s"),
    ],
)
def test_a_figure_without_a_record_is_found(text: str, wrong: str) -> None:
    (line,) = untraced("x.md", list(cut(text)))
    assert f": {wrong}: " in line


@pytest.mark.parametrize(
    "text",
    [
        f"A clip is 1.44 times as fast ({RECORD}).",
        f"# One\n{RECORD}\n\nIt takes 3 s.",
        "It takes 3 s (printed, in\nno record).",
        "```sh\nsleep 3 s\n```\n`3 s` and 128x128 and 4x4x4 tokens",
        "Reckoned, not measured:\n\n| a | GB |\n| --- | --- |\n| dense | 59 |",
    ],
)
def test_what_may_stand(text: str) -> None:
    assert not untraced("x.md", list(cut(text)))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (f"1.44 times as fast, 30.8 dB ({RECORD})", []),
        (f"1.61 times as fast ({RECORD})", ["1.61"]),
        (f"1.44x and 30.9 dB ({RECORD})", ["30.9"]),
        (f"3.3 dB nearer, 30.8 ± 3.3 dB, +3.3 dB ({RECORD})", []),
        (f"<!-- caches: begin -->\n3.3 dB {RECORD}\n<!-- caches: end -->\n", []),
        (f"<!-- caches: begin -->\n<!-- caches: end -->\n3.3 dB {RECORD}", ["3.3"]),
    ],
)
def test_a_figure_that_its_record_has_not_is_found(text: str, wrong: list[str]) -> None:
    lines = untrue("x.md", list(cut(text)))
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == wrong


def test_rounding() -> None:
    assert is_rounded("30.1", 30.08498) and is_rounded("24.0", 23.96958) and is_rounded("15", 15)
    assert not is_rounded("30.1", 30.04) and not is_rounded("1.50", 1.54) and not is_rounded("15", 16)
    assert (RESULTS / "tiny_wan_time_cpu.json").is_file()
