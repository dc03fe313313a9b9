"""GPUs: rates that were measured (gpus.toml, by scripts/fit_estimate.py), and published peaks to scale them by."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dit_accel.errors import UsageError

DATA = Path(__file__).with_name("gpus.toml")
MEASURED = "h200"  # the one that rates were measured on
# What a rate is bound by, and so what it is scaled by on another GPU; others stay as they are.
_COMPUTE = ("matrix_tflops", "attention_tflops_64", "attention_tflops_128", "sparse_tflops_64", "sparse_tflops_128")
_BANDWIDTH = ("bandwidth_gbs",)


@dataclass(frozen=True)
class Gpu:
    """A GPU, with the rates that an estimate is made of."""

    key: str
    name: str
    memory_gb: float  # decimal gigabytes, as published
    peak_tflops: float  # dense, bfloat16
    peak_bandwidth_gbs: float
    multiprocessors: int
    rates: Mapping[str, float]
    measured: bool

    @property
    def how(self) -> str:
        """Where its rates come from, for every output."""
        return "measured" if self.measured else "scaled, not measured"

    def rate(self, name: str) -> float:
        return self.rates[name]

    def attention_rate(self, head_dim: int) -> float:
        """TFLOP/s of dense attention, of heads of the nearest size that was measured."""
        return self.rates[f"attention_tflops_{nearest_head(head_dim)}"]

    def sparse_rate(self, head_dim: int) -> float:
        return self.rates[f"sparse_tflops_{nearest_head(head_dim)}"]


def nearest_head(head_dim: int) -> int:
    """64 or 128, which were measured."""
    return 64 if head_dim < 96 else 128


@lru_cache(maxsize=1)
def read_data() -> Mapping[str, Any]:
    """The data file: `rates` with value, unit and records of each, and the published `gpus`."""
    return tomllib.loads(DATA.read_text(encoding="utf-8"))


def gpu_names() -> tuple[str, ...]:
    return tuple(read_data()["gpus"])


def find_gpu(key: str) -> Gpu:
    """A GPU of the data file.

    Raises:
        UsageError: one that it does not have.
    """
    known = read_data()["gpus"]
    if key.lower() not in known:
        raise UsageError(
            f"GPU {key!r} is not known; there are {', '.join(known)}. For another one give its published figures: "
            "--tflops (dense, bfloat16), --bandwidth (GB/s) and --memory (GB)"
        )
    told = known[key.lower()]
    return _scaled(key.lower(), **told)


def own_gpu(tflops: float, bandwidth: float, memory: float) -> Gpu:
    """A GPU by its published figures: TFLOP/s dense in bfloat16, GB/s, GB.

    Raises:
        UsageError: a figure that is not above 0.
    """
    for name, value in (("tflops", tflops), ("bandwidth", bandwidth), ("memory", memory)):
        if not value > 0:
            raise UsageError(f"--{name} {value:g}: a number above 0 is needed")
    known = read_data()["gpus"][MEASURED]
    many = max(1, round(known["multiprocessors"] * tflops / known["peak_tflops"]))
    return _scaled("own", f"{tflops:g} TFLOP/s, {bandwidth:g} GB/s", memory, tflops, bandwidth, many)


def _scaled(
    key: str, name: str, memory_gb: float, peak_tflops: float, peak_bandwidth_gbs: float, multiprocessors: int
) -> Gpu:
    data = read_data()
    base = data["gpus"][MEASURED]
    rates = {rate: told["value"] for rate, told in data["rates"].items()}
    for rates_of, ratio in (
        (_COMPUTE, peak_tflops / base["peak_tflops"]),
        (_BANDWIDTH, peak_bandwidth_gbs / base["peak_bandwidth_gbs"]),
    ):
        rates |= {rate: rates[rate] * ratio for rate in rates_of}
    return Gpu(
        key, name, memory_gb, peak_tflops, peak_bandwidth_gbs, multiprocessors, rates, measured=key == MEASURED
    )
