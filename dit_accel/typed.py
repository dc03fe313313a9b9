"""The types of values that came from a TOML table, checked in one sentence."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from dit_accel.errors import UsageError

_SAID = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def check_type(value: Any, kind: Any, key: str, where: str) -> Any:
    """The value if it is of the option's type (whole numbers pass for fractions).

    Args:
        kind: one of `int`, `float`, `str`, `bool`, or a union of them, perhaps with None.
        where: what the key belongs to, for the message.

    Raises:
        UsageError: it is of another type, or a whole number too large for a fraction.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, bool) and bool not in kinds:
        pass
    elif isinstance(value, int) and int not in kinds and float in kinds:
        try:
            return float(value)
        except OverflowError:
            raise UsageError(f"{where}: {key} is a whole number of {value.bit_length()} bits: too large") from None
    elif isinstance(value, kinds):
        return value
    asked = " or ".join(_SAID[k] for k in kinds if k in _SAID)
    raise UsageError(f"{where}: {key} = {value!r}: {asked} is needed")


def check_fields(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Check values for fields of a dataclass that are of plain types; of others the class has its own rules.

    Raises:
        UsageError: as `check_type`.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if field.name in values and any(k in _SAID for k in kinds):
            check_type(values[field.name], kind, field.name, where)


def check_finite(value: Any, where: str) -> None:
    """Refuse nan and inf anywhere in a table: no option needs them, and JSON has no word for them.

    Raises:
        UsageError: with the dotted name of the value.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_finite(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            check_finite(inner, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} = {value}: a finite number is needed")
