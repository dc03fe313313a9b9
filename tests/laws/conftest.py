"""The table behind the laws: each runs for families and methods, of which each has a row in a file beside this one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_accel

sys.path.insert(0, str(Path(__file__).parent))
from bench import Bench
from families import FAMILIES, MODELS, Model
from methods_table import EVERYWHERE, METHODS


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every law runs on one thread."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rows of the table for a law: pairs of a family or a model and a method, or either alone."""
    rows = {"bench": list(FAMILIES), "model": list(MODELS), "method": list(METHODS)}
    asked = [name for name in rows if name in metafunc.fixturenames]
    for marker in metafunc.definition.iter_markers("where"):
        table = FAMILIES if asked[0] == "bench" else MODELS
        rows[asked[0]] = [name for name, row in table.items() if getattr(row, marker.args[0])]
    if "method" not in asked or len(asked) == 1:
        for name in asked:
            metafunc.parametrize(name, rows[name], indirect=True)
        return
    host = asked[0]
    everything = metafunc.definition.get_closest_marker("every_pair") is not None
    chosen = [
        (row, method)
        for row, method in itertools.product(rows[host], METHODS)
        if everything or row == rows[host][0] or method in EVERYWHERE
        if not (host == "bench" and FAMILIES[row].line and getattr(METHODS[method](0.4), "needs_grid", False))
    ]
    metafunc.parametrize((host, "method"), chosen, indirect=True)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    family = FAMILIES[request.param]
    return Bench(family, family.make())


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


@pytest.fixture
def method(request: pytest.FixtureRequest) -> Callable[[float], Any]:
    return METHODS[request.param]


@pytest.fixture
def install() -> Callable[..., dit_accel.Handle]:
    """Accelerate a pipeline or a transformer with a method object, in blocks of 16 tokens and with no auto-dense."""

    def install(pipe: Any, method: Any, **options: Any) -> dit_accel.Handle:
        return dit_accel.accelerate(pipe, None, method=method, **{"block": 16, "min_tokens": 0, **options})

    return install


@pytest.fixture
def relative() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return lambda x, true: float((x - true).norm() / true.norm())
