"""Every cache on every family that it can serve, on the pipelines of the laws."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_accel

sys.path.insert(0, str(Path(__file__).parent))  # what several tests share: `from stepping import Model`
sys.path.insert(0, str(Path(__file__).parents[1] / "laws"))
from bench import Bench
from families import FAMILIES

# Options under which each reuses some steps of a short run and computes others, on random models.
CACHES: dict[str, dict[str, Any]] = {
    "easy": {"name": "easy", "threshold": 0.5, "max_consecutive": 1},
    "latent": {"name": "latent", "threshold": 0.5, "max_consecutive": 1},
    "first_block": {"name": "first_block", "threshold": 2.0, "max_consecutive": 1},
    "dual_block": {"name": "dual_block", "threshold": 2.0, "fn": 1, "bn": 0, "warmup": 1, "max_consecutive": 1},
    "tea": {"name": "tea", "threshold": 2.0, "coefficients": (1.0, 0.0), "max_consecutive": 1},
    "mag": {"name": "mag", "threshold": 0.5, "ratios": (1.0, *[0.9] * 30), "max_consecutive": 1},
    "taylor": {"name": "taylor", "interval": 2, "warmup": 1},
    "tokens": {"name": "tokens", "interval": 2, "warmup": 1, "mlp_ratio": 0.3},
}
STACK = {"first_block", "dual_block", "tea", "mag", "taylor"}
TIMED = {"wan-t2v", "wan-i2v", "wan-two-experts"}  # whose blocks are given the time embedding itself
MODULES = {"wan-t2v", "wan-i2v", "wan-two-experts", "flux", "sd3"}  # whose blocks' modules are known
WHOLE_ONLY = {"flux2-klein", "hunyuan-video15-t2v", "z-image"}  # whose blocks diffusers does not describe as one stack
STEPS = 8


def options_of(cache: str, family: str, **more: Any) -> dict[str, Any]:
    found = {**CACHES[cache], "min_steps": 0, **more}
    return {**found, "signal": "time" if family in TIMED else "modulated"} if cache == "tea" else found


def serves(cache: str, family: str) -> bool:
    return family in MODULES if cache == "tokens" else not (family in WHOLE_ONLY and cache in STACK)


def has_one_schedule(family: str) -> bool:
    """Whether one transformer makes all steps: decisions are by transformer, the option is for all of them."""
    return family != "wan-two-experts"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        pairs = [(family, cache) for family in FAMILIES for cache in CACHES if serves(cache, family)]
        if metafunc.definition.get_closest_marker("one_schedule"):
            pairs = [pair for pair in pairs if has_one_schedule(pair[0])]
        metafunc.parametrize("pair", pairs, indirect=True, ids=lambda pair: "-".join(pair))
    elif "cache" in metafunc.fixturenames:
        metafunc.parametrize("cache", list(CACHES))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Equal to the bit from run to run."""


@pytest.fixture
def options_for() -> Callable[..., dict[str, Any]]:
    """`options_of`, for tests that make their own pipelines."""
    return options_of


@pytest.fixture
def sample() -> Callable[..., torch.Tensor]:
    """Latents of a short run of a tiny Wan pipeline, the text encoder left out."""

    def sample(pipe: Any, *, steps: int, seed: int = 0, batch: int = 1, **call: Any) -> torch.Tensor:
        size = pipe.transformer.config.text_dim
        text = [torch.randn(batch, 7, size, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 50)]
        arguments = {"height": 64, "width": 80, "num_frames": 5, "num_inference_steps": steps, **call}
        return pipe(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], output_type="latent",
            generator=torch.Generator().manual_seed(seed), **arguments,
        ).frames  # fmt: skip

    return sample


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(*request.param)


class Pair:
    """A family's pipeline and a cache for it."""

    def __init__(self, family: str, cache: str) -> None:
        self.family, self.cache = family, cache
        self.bench = Bench(FAMILIES[family], FAMILIES[family].make())

    def sample(self, **call: Any) -> Any:
        return self.bench.sample(**{"steps": STEPS, **call})

    def install(self, **more: Any) -> dit_accel.Handle:
        return dit_accel.accelerate(self.bench.pipe, cache=options_of(self.cache, self.family, **more))

    def __repr__(self) -> str:
        return f"{self.family}-{self.cache}"
