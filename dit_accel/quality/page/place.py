"""Where a page goes, known before the work starts."""

from __future__ import annotations

from pathlib import Path

from dit_accel.errors import UsageError
from dit_accel.pipelines.video import check_writable

NAME = "index.html"
_OURS = '<meta name="generator" content="dit_accel">'


def place_page(out: Path) -> Path:
    """The file of a page: `out` itself if it is named *.html, else index.html in that folder.

    Raises:
        UsageError: it cannot be written, or a file of that name is there that is no page of ours.
    """
    file = out if out.suffix.lower() == ".html" else out / NAME
    if out != file and out.is_file():
        raise UsageError(f"{out} is a file; name a folder, or a file that ends in .html")
    check_writable(file, (".html",))
    if file.is_file() and _OURS not in file.read_text(encoding="utf-8", errors="replace")[:4000]:
        raise UsageError(f"{file} is there and is no page of dit-accel; choose another name")
    return file
