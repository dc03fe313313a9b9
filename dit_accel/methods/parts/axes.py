"""Options that are lists of three, one value per axis of the grid. Imports no torch: options are checked without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dit_accel.errors import UsageError


def per_axis(name: str, given: Any, fits: Callable[[Any], bool], rule: str) -> tuple[Any, Any, Any]:
    """An option's values for frames, rows and columns.

    Args:
        name: the option's.
        given: what the user wrote, a list or tuple.
        fits: whether one value is allowed.
        rule: what the values are, in words.

    Raises:
        UsageError: not three values, or one that is not allowed.
    """
    if not isinstance(given, list | tuple) or len(given) != 3 or not all(map(fits, given)):
        raise UsageError(
            f"{name}={given!r} is not possible: {name} is a list of three, for frames, rows and columns; each is "
            f"{rule}."
        )
    return tuple(given)


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number and no smaller than `least`; true and false are no numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
