"""matplotlib's drawings inside a page: text and axes in the page's own colours, so that they read in light and dark."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from dit_accel.errors import EnvironmentProblem

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = 13.0  # font size in the drawing's units, which are pixels at full width
# Colours that stand for the page's, put in their place when the drawing is done. None of them is ever shown.
INK, FAINT, PAPER = "#010203", "#020304", "#030405"
SERIES = tuple(f"#0a000{i}" for i in range(6))
# A shape and a dash for each: colour alone tells nothing to those who cannot see it.
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
_NAMES = {
    INK: "currentColor",
    FAINT: "var(--line)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}
_MISSING = "the page's charts need matplotlib: pip install 'dit-accel[report]'"


def check_drawable() -> None:
    """Raise, before the work, where there is nothing to draw with.

    Raises:
        EnvironmentProblem: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EnvironmentProblem(_MISSING) from None


def colour_map() -> np.ndarray:
    """Colours of 0 to 255, dark to light at even steps of lightness: uint8 `[256, 3]`."""
    check_drawable()
    import matplotlib
    import numpy as np

    return (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes in the page's style; `finish` it within the block."""
    check_drawable()
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none",  # text stays text: it can be found, read aloud and takes the page's font
        "svg.hashsalt": "dit_accel",  # equal data give equal pages
        "font.size": TEXT,
        "hatch.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
        "grid.color": FAINT,
        "legend.frameon": False,
        "legend.fontsize": TEXT - 1,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        yield figure, figure.add_subplot()


def finish(figure: Figure, name: str, alt: str) -> Markup:
    """The drawing as an `<svg>` element.

    Args:
        name: put before every id, since the ids of one page may not repeat.
        alt: what it shows, in words.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", text.split(">", 1)[0]) + (
        ">" + text.split(">", 1)[1]
    )
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    # Releases of matplotlib write the font in one property or in several.
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    for colour, ours in _NAMES.items():
        text = text.replace(colour, ours)
    label = str(Markup.escape(alt))
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
