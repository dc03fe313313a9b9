"""The table behind the laws: each runs for families and methods, of which each has a row in a file beside this one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.adapters import find_adapter

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, MODELS, Family, Model, Request
from methods_table import EVERYWHERE, METHODS


@dataclass
class Bench:
    """One family's pipeline, ready to be sampled again and again."""

    family: Family
    pipe: Any
    kept: dict[Request, dict[str, Any]] = field(default_factory=dict)  # embeddings

    def sample(
        self,
        *,
        batch: int = 1,
        guidance: bool = True,
        other: bool = False,
        steps: int = 3,
        seed: int = 0,
        embedded: bool = False,
        **call: Any,
    ) -> torch.Tensor:
        """Latents `[batch, ...]` of a short run.

        embedded: the prompts are the very same tensors at every call; else new ones.
        """
        request = Request(batch, guidance, other)
        if self.family.prepare is not None:
            self.family.prepare(self.pipe, request)
        arguments = self.family.call(request)
        if embedded or "prompt" not in arguments:
            if not embedded or request not in self.kept:
                self.kept[request] = self.family.embed(self.pipe, request)
            arguments |= self.kept[request]
        arguments |= {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **call,
        }
        made = getattr(self.pipe(**arguments), self.family.output)
        return made if isinstance(made, torch.Tensor) else made[-1]  # of a video in sections: all of it

    def transformers(self) -> list[torch.nn.Module]:
        found = (getattr(self.pipe, name, None) for name in ("transformer", "transformer_2"))
        return [transformer for transformer in found if transformer is not None]

    def attentions(self) -> list[torch.nn.Module]:
        """Self-attentions of the first transformer, in order of use."""
        first = self.transformers()[0]
        return [first.get_submodule(path) for path, _ in find_adapter(first).self_attentions(first)]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every law runs on one thread."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rows of the table for a law: pairs of a family or a model and a method, or either alone."""
    rows = {"bench": list(FAMILIES), "model": list(MODELS), "method": list(METHODS)}
    asked = [name for name in rows if name in metafunc.fixturenames]
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
