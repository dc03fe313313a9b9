"""The site: links that lead out of it become text, formulas become MathML, and it builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from .messages import ROOT

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None,
    reason="needs the extra docs: pip install -c constraints.txt -e '.[docs]'",
)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("folder", "given", "wanted"),
    [
        ("", "see [a](b.md#c) and [d](#e)", "see [a](b.md#c) and [d](#e)"),
        ("", "[web](https://example.org/x)", "[web](https://example.org/x)"),
        ("methods", "[up](../cli.md)", "[up](../cli.md)"),
        ("methods", "![seen](../pictures/x.png)", "![seen](../pictures/x.png)"),
        ("", "a [record](../scripts/results/x.json).", "a {}record</span>."),
        ("", "[[1]](../scripts/results/x.json)", "{}[1]</span>"),
    ],
)
def test_links_out_of_the_site_become_text(hooks: ModuleType, folder: str, given: str, wanted: str) -> None:
    mark = '<span class="in-repository" title="in the repository: scripts/results/x.json">'
    assert hooks.unlink_outside(given, folder) == wanted.format(mark)


def test_code_is_left_alone(hooks: ModuleType) -> None:
    text = "```md\n[x](../a.py)\n```\n\n[x](../a.py)\n"
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    done = hooks.on_page_markdown(text, page, {"nav": [{"Start": [{"First": "index.md"}]}]})
    assert done.startswith("```md\n[x](../a.py)\n```") and done.count("](../a.py)") == 1


def test_a_link_by_file_name_shows_the_title(hooks: ModuleType) -> None:
    titles = dict(hooks.titles_of([{"Start": [{"Presets": "presets.md"}, {"svg2": "methods/svg2.md"}]}]))
    assert titles == {"presets.md": "Presets", "methods/svg2.md": "svg2"}
    given = "[presets.md](../presets.md#a), [its page](svg2.md), [docs/no.md](../no.md)"
    wanted = "[Presets](../presets.md#a), [its page](svg2.md), [docs/no.md](../no.md)"
    assert hooks.name_by_title(given, "methods", titles) == wanted


@needs_mkdocs
def test_a_formula_that_cannot_be_read_ends_the_build(hooks: ModuleType) -> None:
    from mkdocs.exceptions import PluginError

    good = hooks.on_page_content(r'<span class="arithmatex">\(\frac{a}{b} &lt; 1\)</span>')
    assert good.startswith("<math") and "<mfrac>" in good and "arithmatex" not in good
    with pytest.raises(PluginError, match="nosuchthing"):
        hooks.on_page_content(r'<span class="arithmatex">\(\nosuchthing{a}\)</span>')


def test_tables_that_scripts_write_are_not_searched(hooks: ModuleType) -> None:
    given = "<table>a</table><!-- methods: begin --><table>b</table><!-- methods: end --><table>c</table>"
    assert hooks.on_page_content(given).count("<table data-search-exclude>b") == 1
    assert hooks.on_page_content(given).count("data-search-exclude") == 1


@needs_mkdocs
def test_the_site_builds_without_a_warning_and_asks_no_other_server(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {
        path.relative_to(tmp_path / "site").as_posix(): path for path in (tmp_path / "site").rglob("*.html")
    }
    assert {"index.html", "methods/svg2.html", "api.html", "troubleshooting.html"} <= set(pages)
    fetched = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\"> ]+")
    for name, path in pages.items():
        text = path.read_text(encoding="utf-8")
        assert not fetched.search(text), (name, fetched.search(text)[0])
        assert "arithmatex" not in text, name
    assert "<mfrac>" in pages["methods/pooled.html"].read_text(encoding="utf-8")
    index = (tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "compensation all, share_plans True" not in index and "Recall is not quality" in index
    assert 'id="dit_accel.handle.accelerate"' in pages["api.html"].read_text(encoding="utf-8")
