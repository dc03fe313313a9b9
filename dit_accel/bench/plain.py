"""Frozen dataclasses to plain JSON data and back, by their type hints. No torch."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dit_accel.errors import UsageError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses become tables by the names of their fields, tuples lists; what JSON holds already stays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    return value


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """Build a value of a type from what `to_plain` made of it.

    Args:
        kind: a dataclass, or what its fields may be: numbers, texts, tuples, dicts, Literal, and any of these or None.
        where: what is read, for the message.

    Raises:
        UsageError: a key that is missing or unknown, or a value of another type.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in parts:
            return None  # type: ignore[return-value]
        (kind,) = [part for part in parts if part is not type(None)]
        return from_plain(kind, data, where)
    if origin is typing.Literal:
        if data in parts:
            return data
        raise UsageError(f"{where}: {data!r} is none of {', '.join(map(str, parts))}")
    if origin is tuple:
        return _tuple(parts, data, where)
    if origin is dict:
        keys, values = parts
        table = _checked(Mapping, data, where, "a table")
        return {keys(key): from_plain(values, item, f"{where}.{key}") for key, item in table.items()}  # type: ignore
    if kind is float:
        return float(_checked((int, float), data, where, "a number"))  # type: ignore[return-value]
    if kind is Any:
        return data
    return _checked(kind, data, where, kind.__name__)


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    table = _checked(Mapping, data, where, "a table")
    hints = get_type_hints(kind)
    for what, keys in (("lacks", hints.keys() - table.keys()), ("has unknown", table.keys() - hints.keys())):
        if keys:
            raise UsageError(f"{where} {what} {', '.join(sorted(keys))}")
    return kind(**{name: from_plain(hint, table[name], f"{where}.{name}") for name, hint in hints.items()})


def _tuple(parts: tuple, data: Any, where: str) -> Any:
    items = _checked(list, data, where, "a list")
    if len(parts) == 2 and parts[1] is Ellipsis:
        return tuple(from_plain(parts[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if len(items) != len(parts):
        raise UsageError(f"{where}: {len(parts)} items are needed, not {len(items)}")
    return tuple(from_plain(part, item, f"{where}[{i}]") for i, (part, item) in enumerate(zip(parts, items)))  # noqa: B905


def _checked(kind: Any, data: Any, where: str, name: str) -> Any:
    wrong = isinstance(data, bool) and kind is not bool
    if wrong or not isinstance(data, kind):
        raise UsageError(f"{where}: {name} is needed, not {data!r}")
    return data
