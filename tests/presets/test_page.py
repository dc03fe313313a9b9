"""docs/presets.md says what is so: its examples are presets, its tables are complete."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from dit_accel.pipelines import RECIPES
from dit_accel.preset import LEVELS, STATUSES, GenerateOptions, load_preset, resolve
from dit_accel.preset_files import FOLDER_VARIABLE, SCHEMA, parse_presets, read_shipped
from dit_accel.provenance import Provenance

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "presets.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.+?)```", PAGE + (DOCS / "cli.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_presets(example: str) -> None:
    file = parse_presets(example, "docs")
    (name,) = file.tables
    assert resolve(name, file, read_shipped()).name == "mine"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3


def test_the_table_names_every_key() -> None:
    rows = dict(re.findall(r"^\| `\[?(\w+)\]?` \| (.+) \|$", PAGE, re.M))
    preset = load_preset("tiny-wan-fast").to_dict()
    of_the_program = {"name", "origin", "sources"}
    assert set(rows) == set(preset) - of_the_program | {"extends"}
    options = {field.name for field in dataclasses.fields(GenerateOptions)}
    assert set(re.findall(r"`(\w+)`", rows["generate"])) == options
    assert set(re.findall(r"`(\w+)`", rows["pipeline"])) == set(RECIPES)
    assert tuple(re.findall(r"`(\w+)`", rows["level"])) == LEVELS
    assert set(re.findall(r"`(\w+)`", rows["status"])) == set(STATUSES)


def test_the_rest_is_named() -> None:
    assert f"`{FOLDER_VARIABLE}`" in PAGE and f"version = {SCHEMA}" in PAGE
    for field in dataclasses.fields(Provenance):
        assert re.search(rf"^(\[mine\.provenance\.)?{field.name}\b", PAGE, re.M), field.name
