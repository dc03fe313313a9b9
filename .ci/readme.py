"""Print a command of the README by its mark, so that what CI runs and what the README says cannot drift apart."""

import re
import sys
from pathlib import Path


def command(name: str) -> str:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    match = re.search(rf"<!-- command: {re.escape(name)} -->\n```sh\n(.+?)\n```", text, re.S)
    if match is None:
        sys.exit(f"README.md has no command marked {name!r}")
    return match[1]


if __name__ == "__main__":
    print(command(sys.argv[1]))
