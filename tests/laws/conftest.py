"""The table behind the laws: every method and every family has a row, and each law runs for all of them.

A new method adds a line to `METHODS`, a new family one to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

import dit_accel
from dit_accel.methods import load_method
from dit_accel.testing import tiny_wan_pipeline

FRAMES, HEIGHT, WIDTH = (
    9,
    96,
    112,
)  # 3 x 6 x 7 = 126 tokens: an odd number of columns, 8 blocks of 16 and a tail


@dataclass(frozen=True)
class Remember:
    """A method with memory, to catch state that leaks: half of each score is that of the step before."""

    keep: float

    def init_state(self, query: torch.Tensor, layout: Any) -> dict[str, Any]:
        return {"scores": None, "owner": None}

    def predict(self, query: torch.Tensor, key: torch.Tensor, layout: Any, call: Any, state: Any) -> Any:
        from dit_accel.methods.parts.budget import choose_blocks
        from dit_accel.methods.parts.plans import plan_of
        from dit_accel.methods.parts.score import block_means, mean_scores

        scores = mean_scores(query, block_means(key, layout), layout)
        if state is not None:
            owner = (call.run, call.role, call.branch, call.layer)
            assert state["owner"] in (None, owner), (
                "this state was made by another run, role, branch or layer"
            )
            state["owner"] = owner
            if state["scores"] is not None:
                scores = (scores + state["scores"]) / 2
            state["scores"] = scores
        return plan_of(*choose_blocks(scores, None, self.keep), layout)


# `random` is a control: it draws anew for each branch name. At 1.0 each reads everything; below, about as much as the
# number says.
METHODS: dict[str, Callable[[float], Any]] = {
    "pooled": lambda keep: load_method("pooled", keep=keep),
    "remember": Remember,
    "lite": lambda keep: load_method("lite", threshold=-1e4 if keep == 1 else -0.5),
    "rectified": lambda keep: load_method("rectified", keep=keep, top_p=0.1, neighbours=None, anchor=False),
    "sparge": lambda keep: load_method("sparge", keep=keep),
    "sparge-l1": lambda keep: load_method("sparge", l1=0.4, keep=1.0 if keep == 1 else None),
    "svg1": lambda keep: load_method("svg1", keep=keep),
    "svg2": lambda keep: load_method("svg2", keep=keep),
    "nabla": lambda keep: load_method("nabla", top_p=keep, keep=keep),
    "radial": lambda keep: load_method("radial", **({"decay_factor": 100, "vote": 0} if keep == 1 else {})),
    "neighborhood": lambda keep: load_method("neighborhood", window=[1.0 if keep == 1 else 0.6] * 3),
    "clear": lambda keep: load_method("clear", radius=100 if keep == 1 else 3),
}
# On every family; the others on the first. What differs between families is the host, not the method.
EVERYWHERE = ("pooled", "remember", "lite", "svg2")


@dataclass(frozen=True)
class Family:
    """A tiny pipeline and how to call it."""

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]


def _video() -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}


def _image() -> dict[str, Any]:
    gradient = torch.arange(HEIGHT * WIDTH * 3).remainder(251).to(torch.uint8).view(HEIGHT, WIDTH, 3)
    return {**_video(), "image": Image.fromarray(gradient.numpy())}


FAMILIES: dict[str, Family] = {
    "wan-t2v": Family(tiny_wan_pipeline, _video),
    "wan-i2v": Family(lambda: tiny_wan_pipeline(i2v=True), _image),
    "wan-two-experts": Family(lambda: tiny_wan_pipeline(two_experts=True), _video),
}


@dataclass
class Bench:
    """One family's pipeline, ready to be sampled again and again."""

    pipe: Any
    inputs: dict[str, Any]

    def sample(self, *, batch: int = 1, guidance: bool = True, steps: int = 3, seed: int = 0, **call: Any):
        """Latents `[batch, ...]` of a short run."""
        arguments = {
            "prompt": ["a red star moves left", "a small blue circle spins"][:batch],
            "negative_prompt": ["blurry"] * batch,
            "guidance_scale": 5.0 if guidance else 1.0,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **self.inputs,
            **call,
        }
        return self.pipe(**arguments).frames

    def transformers(self) -> list[torch.nn.Module]:
        return [
            t for t in (self.pipe.transformer, getattr(self.pipe, "transformer_2", None)) if t is not None
        ]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every law runs on one thread."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rows of the table for a law: pairs of a family and a method, or either alone."""
    families, methods = list(FAMILIES), list(METHODS)
    if {"bench", "method"} <= set(metafunc.fixturenames):
        pairs = [(f, m) for f in families for m in methods if f == families[0] or m in EVERYWHERE]
        metafunc.parametrize(("bench", "method"), pairs, indirect=True)
    elif "bench" in metafunc.fixturenames:
        metafunc.parametrize("bench", families, indirect=True)
    elif "method" in metafunc.fixturenames:
        metafunc.parametrize("method", methods, indirect=True)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    family = FAMILIES[request.param]
    return Bench(family.make(), family.inputs())


@pytest.fixture
def method(request: pytest.FixtureRequest) -> Callable[[float], Any]:
    return METHODS[request.param]


@pytest.fixture
def install() -> Callable[..., dit_accel.Handle]:
    """Accelerate a pipeline with a method object, in blocks of 16 tokens and with no auto-dense."""

    def install(pipe: Any, method: Any, **options: Any) -> dit_accel.Handle:
        return dit_accel.accelerate(pipe, None, method=method, **{"block": 16, "min_tokens": 0, **options})

    return install


@pytest.fixture
def relative() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return lambda x, true: float((x - true).norm() / true.norm())
