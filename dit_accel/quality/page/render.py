"""From plain data to one HTML file. Everything that came from outside is escaped by the template engine."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dit_accel.pipelines.staging import Stage
from dit_accel.quality.page.model import Page

_HERE = "dit_accel.quality.page"


def render(page: Page) -> str:
    """The page as HTML that needs nothing beside it."""
    environment = Environment(
        loader=PackageLoader(_HERE, ""), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    # A script element ends at "</", in whatever it holds; JSON may write the sign otherwise.
    raw = Markup(page.raw.replace("<", "\\u003c"))
    return environment.get_template("page.html.j2").render(
        page=page, raw=raw, style=_own("page.css"), script=_own("page.js")
    )


def save(page: Page, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    text = render(page)
    with Stage() as stage:
        stage.write_text(path, text)


def _own(name: str) -> Markup:
    return Markup((files(_HERE) / name).read_text(encoding="utf-8"))
