"""What the code says to people: errors, remarks, warnings, reasons of dense calls and of forwards with all tokens.

They are read from its syntax.

A value that is filled in is written `…`, here and on the page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOLE = "…"
ERRORS = {
    "DitAccelError",
    "EnvironmentProblem",
    "FallbackError",
    "KernelUnavailable",
    "LayoutError",
    "NotFiniteError",
    "OutOfMemory",
    "UnknownModelError",
    "UsageError",
}
SAID = {"remark", "warning", "info", "_say", "_say_once"}
WHY = re.compile(r"_?why_(\w+_)?(dense|whole|never|lacking|sampler)(_part|_at)?$|_?why_no_grid$")
# A caller's mistakes with tensors, in parts that users do not call by hand, and tools of developers.
LEFT_OUT = ("kernels", "dit_accel/training", "dit_accel/testing", "dit_accel/quality", "dit_accel/plan.py")


@dataclass(frozen=True)
class Message:
    """One message, and where it is written."""

    place: str
    text: str


def sources() -> list[Path]:
    """The files whose messages users meet."""
    found = [
        path for folder in ("dit_accel", "pipelines", "presets") for path in (ROOT / folder).rglob("*.py")
    ]
    return sorted(path for path in found if not path.relative_to(ROOT).as_posix().startswith(LEFT_OUT))


def messages() -> Iterator[Message]:
    """Every message of these files."""
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = constants(tree)
        for node in ast.walk(tree):
            for line, text in _said_by(node, names):
                yield Message(f"{path.relative_to(ROOT).as_posix()}:{line}", text)


def texts_elsewhere() -> Iterator[str]:
    """What else people may meet: texts that have names of their own, and why an executor cannot run."""
    for path in sources():
        yield from constants(ast.parse(path.read_text(encoding="utf-8"))).values()
    tree = ast.parse((ROOT / "kernels" / "block_sparse" / "api.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        yield from (text for _, text in _said_by(node, {}))


def constants(tree: ast.Module) -> dict[str, str]:
    """A module's own constants that are texts."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            text = _text(node.value, {})
            if text is not None:
                found[node.targets[0].id] = text
    return found


def _said_by(node: ast.AST, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Call) and node.args:
        called = node.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        text = _text(node.args[0], names)
        if text is not None and name == "unknown_name":
            yield node.lineno, f"Unknown {text} {HOLE}"
        elif text is not None and (name in ERRORS | SAID or name in ("_foresee", "count_dense")):
            yield node.lineno, text
    elif isinstance(node, ast.FunctionDef) and WHY.match(node.name):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Return) and inner.value is not None:
                value = inner.value.elts[0] if isinstance(inner.value, ast.Tuple) else inner.value
                text = _text(value, names)
                if text is not None:
                    yield inner.lineno, text


def _text(node: ast.AST, names: dict[str, str]) -> str | None:
    """A text as far as it is written; None if nothing of it is."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else names.get(getattr(part.value, "id", ""), HOLE)
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [_text(side, names) for side in (node.left, node.right)]
        return None if sides == [None, None] else "".join(HOLE if side is None else side for side in sides)
    return None
