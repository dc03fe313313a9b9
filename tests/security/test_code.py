"""What this package never does: run text as code, open pickles, or hand words to a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("dit_accel", "kernels", "pipelines", "presets", "scripts", ".ci")
    for path in (ROOT / folder).rglob("*.py")
)
NAMES = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "dill", "marshal", "shelve", "cloudpickle", "pty", "commands"}
METHODS = {("os", "system"), ("os", "popen"), ("torch", "load"), ("yaml", "load"), ("subprocess", "getoutput")}


def offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines of a file that run text, open pickles or start shells."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in NAMES:
            yield node.lineno, called.id
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            if (called.value.id, called.attr) in METHODS:
                yield node.lineno, f"{called.value.id}.{called.attr}"
        for word in node.keywords:
            off = isinstance(word.value, ast.Constant) and word.value.value is False
            if word.arg in ("shell", "trust_remote_code", "allow_pickle") and not off:
                yield node.lineno, word.arg


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_runs_text_or_opens_pickles(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "line",
    [
        *("eval('1')", "import pickle", "from pickle import loads"),
        *("os.system('ls')", "torch.load('x')", "run(x, shell=True)"),
    ],
)
def test_the_look_finds_them(line: str) -> None:
    assert list(offences(ast.parse(line)))
