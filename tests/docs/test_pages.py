"""The pages hang together: each is in the order of the site, links lead somewhere, option tables are the code's."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dit_accel.methods import method_class, method_names

from .messages import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.S | re.M)


def nav() -> list[str]:
    """The pages of the site, in their order."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(part: object) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from pages(inner)

    return list(pages(config["nav"]))


def read(page: str) -> str:
    """A page without its code."""
    return FENCED.sub("", (DOCS / page).read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What links may name behind `#`, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_order_once_and_is_there() -> None:
    assert sorted(nav()) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    lost = []
    for target in LINK.findall(read(page)):
        if ":" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (DOCS / page).parent / path if path else DOCS / page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            lost.append(target)
    assert not lost


@pytest.mark.parametrize("page", PAGES)
def test_links_out_of_the_pages_stay_in_the_repository(page: str) -> None:
    for target in LINK.findall(read(page)):
        if ":" not in target and not target.startswith("#"):
            assert ((DOCS / page).parent / target.partition("#")[0]).resolve().is_relative_to(ROOT), target


def told(default: object) -> str:
    """A default as the tables write it."""
    if default is dataclasses.MISSING:
        return "needed"
    if default is None:
        return "none"
    return json.dumps(default)


@pytest.mark.parametrize("name", method_names())
def test_a_method_has_a_page_with_its_options_and_a_picture(name: str) -> None:
    text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    options = text.partition("\n## Options\n")[2].partition("\n## ")[0]
    table = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", options, re.M)
    fields = {field.name: field.default for field in dataclasses.fields(method_class(name))}
    assert [option for option, _ in table] == list(fields)
    for option, default in table:
        is_third = default == "1/3" and fields[option] == 1 / 3
        assert is_third or default == told(fields[option]), option
    picture = DOCS / "pictures" / "methods" / f"{name}.png"
    assert f"../pictures/methods/{name}.png" in text and 2_000 < picture.stat().st_size < 60_000


def test_every_method_page_is_of_a_method() -> None:
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} == set(method_names())


def test_method_pages_have_the_same_parts() -> None:
    for name in method_names():
        found = re.findall(r"^## (.+)$", (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8"), re.M)
        assert found == ["What it computes", "Options", "When", "Source"], name


def test_method_pages_hold_no_figures_of_their_own() -> None:
    """What was measured stands in tables that are traced to records."""
    measured = re.compile(r"\d(?:\.\d+)?(?: dB| ms|x\b(?! \d)| times as fast)")
    for name in method_names():
        text = re.sub(r"`[^`]*`|\$[^$]*\$", "", read(f"methods/{name}.md"))
        assert not measured.search(text), name


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_safe_from_markdown(page: str) -> None:
    """A backslash before a sign is Markdown's own escape, and reaches some renderers of formulas without it."""
    text = re.sub(r"`[^`]*`", "", read(page))
    for formula in re.findall(r"\$\$.*?\$\$|\$[^$\n]+\$", text, re.S):
        assert not re.search(r"\\[^A-Za-z ]", formula), formula
