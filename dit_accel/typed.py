"""The type of a value that came from a TOML table, checked in one sentence."""

from __future__ import annotations

import types
import typing
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
