"""The `dit-accel` command line: one file per verb. torch is imported inside the verbs, never to show help."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script: run the command, leave with a documented exit code."""
    from dit_accel.cli.app import run

    sys.exit(run(sys.argv[1:]))
