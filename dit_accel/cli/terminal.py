"""What goes to the terminal: data to stdout, all that is said about it to stderr. NO_COLOR is honoured."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from dit_accel.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console


def complain(message: str) -> None:
    """Print an error as one line on stderr."""
    line = one_line(message)
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[1;31merror:\x1b[0m {line}" if coloured else f"error: {line}", file=sys.stderr)


def remark(message: str, *, quiet: bool = False) -> None:
    """Print a line about the work on stderr."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def tables(*, stderr: bool = False) -> Console:
    """A rich console for tables: on stdout, if they are the answer. Wide where nobody watches: nothing is cut."""
    from rich.console import Console

    told = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if told else 160, stderr=stderr)
