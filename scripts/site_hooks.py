"""What `mkdocs build` does to the pages beside rendering them (mkdocs.yml, `hooks`).

Formulas, `$...$` and `$$...$$` in the sources, become MathML, which browsers draw by themselves: no script and no
network. Links to files outside of docs/ work in the repository and lead nowhere on the site, so there they become their
text, with the path as a hint. A link whose text is a file's name, as suits the repository, shows the page's title.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from typing import Any

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.S)
_WRITTEN = re.compile(r"<!-- [\w ]+: begin -->.*?<!-- [\w ]+: end -->", re.S)
_FENCED = re.compile(r"(^```.*?^```$)", re.S | re.M)
_LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Take the links out of docs/ away and name the others by titles, outside of code."""
    folder = posixpath.dirname(page.file.src_uri)
    titles = dict(titles_of(config["nav"]))
    parts = _FENCED.split(markdown)
    parts[::2] = (name_by_title(unlink_outside(part, folder), folder, titles) for part in parts[::2])
    return "".join(parts)


def on_page_content(content: str, **_: Any) -> str:
    """Draw the formulas, and keep tables that scripts write out of the search: their figures would fill every answer.

    Raises:
        PluginError: a formula that cannot be read; the build fails.
    """
    content = _WRITTEN.sub(lambda part: part[0].replace("<table>", "<table data-search-exclude>"), content)
    return _FORMULA.sub(_to_mathml, content)


def unlink_outside(markdown: str, folder: str) -> str:
    """The text of links to files outside of docs/, for a page in `folder` of docs/ ("" is docs/ itself)."""

    def text_of(link: re.Match[str]) -> str:
        target = link["target"]
        if ":" in target or target.startswith("#"):
            return link[0]
        path = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))
        if path.startswith("docs/"):
            return link[0]
        return f'<span class="in-repository" title="in the repository: {html.escape(path)}">{link["text"]}</span>'

    return _LINK.sub(text_of, markdown)


def name_by_title(markdown: str, folder: str, titles: dict[str, str]) -> str:
    """Links with the titles of pages in place of their files' names. `titles`: by path in docs/."""

    def named(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["target"].partition("#")[0]))
        is_name = link["text"].endswith(".md") and " " not in link["text"] and path in titles
        return f"[{titles[path]}]({link['target']})" if is_name else link[0]

    return _LINK.sub(named, markdown)


def titles_of(nav: Any) -> Iterator[tuple[str, str]]:
    """Path and title of each page of the site's order, as mkdocs.yml has it."""
    for part in nav if isinstance(nav, list) else ():
        for title, inner in part.items():
            if isinstance(inner, str):
                yield inner, title
            else:
                yield from titles_of(inner)


def _to_mathml(formula: re.Match[str]) -> str:
    from latex2mathml.converter import convert
    from mkdocs.exceptions import PluginError

    latex, block = html.unescape(formula["latex"]).strip(), formula["tag"] == "div"
    try:
        drawn = convert(latex, display="block" if block else "inline")
    except Exception as error:
        raise PluginError(f"the formula {latex!r} cannot be read: {error!r}") from error
    if "\\" in re.sub(r"<[^>]*>", "", drawn):
        raise PluginError(f"the formula {latex!r} holds a command that is not known: {drawn}")
    return f'<div class="formula">{drawn}</div>' if block else drawn
