"""As a preset: an allocation in the words of presets, and these as TOML. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dit_accel.options import SparseOptions
from dit_accel.preset import GenerateOptions, Preset, resolve
from dit_accel.preset_files import SCHEMA, parse_presets, read_shipped
from dit_accel.tuning.problem import Allocation
from dit_accel.tuning.threshold import CACHE, on_with


def tables_of(
    base: Preset,
    options: SparseOptions,
    allocation: Allocation,
    keeps: Sequence[float],
    noise: Sequence[float],
    bucket: Sequence[int],
) -> dict[str, Any]:
    """The tables of a preset that does what an allocation says, claims left out.

    Args:
        base: has the recipe and the sampling.
        options: sparse ones that were tuned, without a schedule.
        keeps: the allocation's places 1, 2, ... stand for these.
        noise, bucket: of each step.
    """
    told: dict[str, Any] = {"pipeline": base.pipeline, "model": base.model}
    told["generate"] = _changed(dataclasses.asdict(base.generate), dataclasses.asdict(GenerateOptions()))
    rules = list(_rules(allocation, noise, bucket))
    used = Counter(place for place, _, _, layers in rules for _ in layers if place)
    if used:
        common = used.most_common(1)[0][0]
        plain = SparseOptions(method=options.method).to_mapping()
        told["sparse"] = {"method": options.method, **_changed(options.to_mapping(), plain), "keep": keeps[common - 1]}
        told["sparse"].pop("rules", None)
        n_layers = len(allocation.keeps)
        written = [
            _rule(above, below, None if len(layers) == n_layers else layers, keeps[place - 1] if place else None)
            for place, above, below, layers in rules
            if place != common
        ]
        if written:
            told["sparse"]["rules"] = written
    if allocation.threshold is not None:
        rows = {} if allocation.most is None else {"max_consecutive": allocation.most}
        told["cache"] = {"name": CACHE, "threshold": round(allocation.threshold, 6), **rows, **on_with(len(noise))}
    elif not all(allocation.computed):
        schedule = "".join("01"[x] for x in allocation.computed)
        way = dataclasses.asdict(allocation.predictor) if allocation.predictor.order else {}
        told["cache"] = {"name": CACHE, "schedule": schedule, **way, **on_with(len(noise))}
    return told


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}


def _rules(
    allocation: Allocation, noise: Sequence[float], bucket: Sequence[int]
) -> Iterator[tuple[int, float, float | None, tuple[int, ...]]]:
    """(place, above, below, layers) of every part of the table, neighbouring buckets that agree being one."""
    n_buckets = max(bucket) + 1
    lows = []  # of each bucket: halfway to the next one's first step
    for b in range(n_buckets):
        last = max(step for step, of in enumerate(bucket) if of == b)
        lows.append(round((noise[last] + noise[last + 1]) / 2, 4) if last + 1 < len(noise) else 0.0)
    highs = [None, *lows[:-1]]
    open_: dict[tuple[int, tuple[int, ...]], int] = {}  # what goes on from the bucket before: where it began
    for b in range(n_buckets + 1):
        here: dict[int, list[int]] = {}
        if b < n_buckets:
            for layer, row in enumerate(allocation.keeps):
                here.setdefault(row[b], []).append(layer)
        now = {(place, tuple(layers)) for place, layers in here.items()}
        for part in [part for part in open_ if part not in now]:
            yield part[0], lows[b - 1], highs[open_.pop(part)], part[1]
        for part in sorted(now - set(open_)):
            open_[part] = b


def _rule(above: float, below: float | None, layers: Sequence[int] | None, keep: float | None) -> dict[str, Any]:
    table: dict[str, Any] = {"above": above} if above else {}
    if below is not None:
        table["below"] = below
    if layers is not None:
        table["layers"] = list(layers)
    return {**table, **({"dense": True} if keep is None else {"keep": keep})}


def to_toml(name: str, tables: Mapping[str, Any], head: str = "") -> str:
    """A preset file of one preset. Values that are None are left out.

    Args:
        head: a remark for its first lines.
    """
    lines = [f"# {line}" for line in head.splitlines()]
    return "\n".join([*lines, f"version = {SCHEMA}", "", *_table(name, tables)]) + "\n"


def _table(path: str, table: Mapping[str, Any]) -> Iterator[str]:
    yield f"[{path}]"
    inner = {}
    for key, value in table.items():
        if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            inner[key] = value
        elif value is not None:
            yield f"{key} = {_value(value)}"
    for key, value in inner.items():
        if isinstance(value, Mapping) and "at" not in value:
            yield from _table(f"{path}.{key}", value)
        elif isinstance(value, Mapping):
            yield f"[{path}.{key}]"
            yield from (f"{name} = {_value(x)}" for name, x in value.items())
        else:
            for rule in value:
                yield f"[[{path}.{key}]]"
                yield from (f"{name} = {_value(x)}" for name, x in rule.items())


def _value(value: Any) -> str:
    if isinstance(value, str):  # JSON's strings are TOML's, but for one sign that must not stand plainly
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def load(text: str, name: str, origin: str) -> Preset:
    """The preset of a file's text, checked as any other.

    Raises:
        UsageError: a mistake in it.
    """
    return resolve(name, parse_presets(text, origin), read_shipped())
