"""What can go wrong, as a tree.

DitAccelError                 exit 1   the run failed
├── UsageError                exit 2   an option, preset, method, size or call that cannot be (also a ValueError)
│   ├── UnknownNameError               a name that is not in a closed list; offers the nearest one
│   └── UnknownModelError              a transformer of no known family
├── EnvironmentProblem        exit 3   a dependency, weight file, GPU or kernel that is missing or unfit
│   └── KernelUnavailable              an executor that was asked for by name and cannot run this call
├── NotFiniteError            exit 1   what was made holds numbers that are not finite
├── OutOfMemory               exit 1   memory ran out, told with what our parts need of it
├── FallbackError             exit 4   `strict=True` and something would have run dense unplanned
└── LayoutError               exit 1   tokens that do not fit the grid they are said to have

Every message names what was given, what is allowed and what to do. Importing this module imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DitAccelError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code: int = 1


class UsageError(DitAccelError, ValueError):
    """The caller asked for something that cannot be."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name outside a closed list. Build it with `unknown_name`."""


class UnknownModelError(UsageError):
    """A transformer of a family that no adapter describes."""


class EnvironmentProblem(DitAccelError):
    """Something this machine or this installation lacks."""

    exit_code = 3


class KernelUnavailable(EnvironmentProblem):
    """An executor was asked for by name and cannot run this call; the message says why."""


class NotFiniteError(DitAccelError):
    """A run ended in numbers that are not finite."""


class OutOfMemory(DitAccelError):
    """Memory ran out; the message says what was asked for, what our parts need and what to do."""


class FallbackError(DitAccelError):
    """`strict=True` forbids the dense fall-back that this call would have needed."""

    exit_code = 4


class LayoutError(DitAccelError):
    """The tokens do not fit the grid they are said to have."""


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> UnknownNameError:
    """Build the error for a name outside a closed list, with the nearest allowed one.

    Args:
        kind: what the name stands for, as a noun ("preset", "method", "option").
        given: the name as it was given.
        allowed: every allowed name.

    Returns:
        The error, to be raised by the caller (so that the traceback starts there).
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"Unknown {kind} {given!r}.{hint} Allowed: {', '.join(names) or 'none'}.")


def one_line(text: str) -> str:
    """The text in one line that a terminal can show: no line breaks, no control characters."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(text.split()))
