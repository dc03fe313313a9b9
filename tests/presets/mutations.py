"""Preset files as nobody would write them: shipped presets with a few things changed, from a seed."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dit_accel.caches import cache_class, cache_names
from dit_accel.methods import method_names, method_options
from dit_accel.options import SparseOptions
from dit_accel.preset import GenerateOptions
from dit_accel.region.options import Region
from dit_accel.roles import ROLES

ODD = (
    0, -1, 1, 2, 7, True, False, 10**30, -(10**400), 2**63, 0.0, -0.0, 0.5, 1.5, 1e308, math.nan, math.inf, -math.inf,
    "", " ", "x", "pooled", "easy", "latent", "true", "0.5", "nan", "\u2028", "a\nb", "\x1b[31m", "é漢🙂", "a" * 3000,
    [], [0], [[]], [0, -1, 2], [1.5, "x"], [{}], [{"above": 0.5, "keep": 0.5}], [{"keep": 2}], {}, {"x": 1},
    {"keep": 0.5}, {"name": "easy"}, {"transformer": {}}, {"transformer": False},
    {"transformer_2": {"transformer": {}}},
)  # fmt: skip
NAMES = (
    "version", "extends", "provenance", "mine", "", "a.b", 'q"uote', "\\", "line\nbreak", "\u2028", "漢字", "x" * 300,
)  # fmt: skip


def mutate(seed: int, shipped: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of one file."""
    draw = random.Random(seed)
    names = [name for name in shipped if "provenance" in shipped[name]] if draw.random() < 0.2 else list(shipped)
    name = draw.choice(names)
    if draw.random() < 0.3:  # a user's few lines: one option, mostly wrong
        document: dict[str, Any] = {"mine": {"extends": name}}
        add_option(document, draw)
        return write_toml(document)
    document = {"version": 1} if draw.random() < 0.7 else {}
    document[name] = copy.deepcopy(dict(shipped[name]))
    if draw.random() < 0.3 and "extends" in shipped[name]:
        parent = shipped[name]["extends"]
        document[parent] = copy.deepcopy(dict(shipped[parent]))
    for _ in range(draw.randint(1, 3)):
        draw.choice(CHANGES)(document, draw)
    text = write_toml(document)
    return draw.choice(SPOILS)(text, draw) if draw.random() < 0.25 else text


def _tables(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield table
    for value in table.values():
        if isinstance(value, dict):
            yield from _tables(value)


def _any_table(document: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    return draw.choice(list(_tables(document)))


def change_value(document: dict[str, Any], draw: random.Random) -> None:
    table = _any_table(document, draw)
    if table:
        table[draw.choice(list(table))] = copy.deepcopy(draw.choice(ODD))


def misspell(document: dict[str, Any], draw: random.Random) -> None:
    table = _any_table(document, draw)
    if table:
        key = draw.choice(list(table))
        at = draw.randrange(len(key) + 1)
        table[key[:at] + draw.choice(["", "x", "é", " ", ".", key[at : at + 1]]) + key[at + 1 :]] = table.pop(key)


def nest(document: dict[str, Any], draw: random.Random) -> None:
    table = _any_table(document, draw)
    if table:
        key = draw.choice(list(table))
        inner = draw.choice([key, *ROLES, *NAMES])
        table[key] = draw.choice([{inner: table[key]}, [table[key]], {inner: {inner: {inner: table[key]}}}])


def drop(document: dict[str, Any], draw: random.Random) -> None:
    table = _any_table(document, draw)
    if table:
        table.pop(draw.choice(list(table)))


def add_option(document: dict[str, Any], draw: random.Random) -> None:
    """A known option, mostly with a value that it may not have."""
    group, keys = draw.choice(list(_options().items()))
    preset = document.get(draw.choice([*document, "mine"]))
    if not isinstance(preset, dict):
        return
    table = preset.setdefault(group, {})
    if isinstance(table, dict):
        if draw.random() < 0.3:
            table = table.setdefault(draw.choice(ROLES), {})
        if isinstance(table, dict):
            if group == "cache":
                table.setdefault("name", draw.choice(cache_names()))
            if group == "sparse" and draw.random() < 0.5:
                table["method"] = draw.choice(method_names())
            table[draw.choice(keys)] = copy.deepcopy(draw.choice(ODD))


@functools.cache
def _options() -> dict[str, list[str]]:
    of_caches = {key for name in cache_names() for key in cache_class(name).__dataclass_fields__}
    of_methods = {key for name in method_names() for key in method_options(name)}
    return {
        "generate": list(GenerateOptions.__dataclass_fields__),
        "sparse": sorted({*SparseOptions.__dataclass_fields__, *of_methods}),
        "cache": sorted({"name", *of_caches}),
        "region": list(Region.__dataclass_fields__),
    }


def circle(document: dict[str, Any], draw: random.Random) -> None:
    """Presets that extend one another without end, or something that cannot be extended."""
    names = [name for name, table in document.items() if isinstance(table, dict)]
    if names:
        for name in names:
            document[name]["extends"] = draw.choice([*names, "tiny-wan", *NAMES])
        document[names[0]]["extends"] = draw.choice([names[-1], *ODD])


def rename(document: dict[str, Any], draw: random.Random) -> None:
    if document:
        document[draw.choice(NAMES)] = document.pop(draw.choice(list(document)))


CHANGES: tuple[Callable[[dict[str, Any], random.Random], None], ...] = (
    change_value, change_value, misspell, nest, drop, add_option, add_option, circle, rename,
)  # fmt: skip


def truncate(text: str, draw: random.Random) -> str:
    return text[: draw.randrange(len(text) + 1)]


def scatter(text: str, draw: random.Random) -> str:
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        sign = draw.choice(["\0", "[", "]", "=", '"', "'", "\n", "#", ".", "{", "\ufeff", "\r", "9", "漢"])
        text = text[:at] + sign + text[at + draw.randint(0, 1) :]
    return text


def repeat_a_line(text: str, draw: random.Random) -> str:
    lines = text.split("\n")
    at = draw.randrange(len(lines))
    return "\n".join(lines[:at] + [lines[at]] * 2 + lines[at + 1 :])


def go_deep(text: str, draw: random.Random) -> str:
    depth = draw.choice([5, 50, 500, 3000])
    lists, tables = f"{'[' * depth}{']' * depth}", f"{'{x = ' * depth}1{'}' * depth}"
    signs = [f"x = {lists}", f"x = {tables}", f"[{'.'.join(['a'] * depth)}]"]
    return f"{text}\n{draw.choice(signs)}\n"


def grow(text: str, draw: random.Random) -> str:
    key, sign = draw.choice(["keep", "steps", "version", "zzz"]), draw.choice(["", "-", "0.", "1e"])
    return f"{text}\n{key} = {sign}{'9' * draw.choice([30, 400, 5000])}\n"


SPOILS: tuple[Callable[[str, random.Random], str], ...] = (truncate, truncate, scatter, repeat_a_line, go_deep, grow)


def write_toml(document: dict[str, Any]) -> str:
    """A document as TOML: plain values first, then tables, whatever they are called."""
    return "".join(_lines((), document))


def _lines(path: tuple[str, ...], table: dict[str, Any]) -> Iterator[str]:
    if path:
        yield f"[{'.'.join(map(_quote, path))}]\n"
    for key, value in table.items():
        if not isinstance(value, dict):
            yield f"{_quote(key)} = {_write(value)}\n"
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _lines((*path, key), value)


def _quote(text: str) -> str:
    signs = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(signs.get(s, s if s >= " " and s != "\x7f" else f"\\u{ord(s):04x}") for s in text) + '"'


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_write, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quote(key)} = {_write(item)}" for key, item in value.items()) + "}"
    return repr(value)
