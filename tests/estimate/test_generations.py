"""Whole generations against the records: times and gains within 15 %, and as many dense steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_accel.estimate import Estimate, estimate
from dit_accel.estimate.full_size import CASES
from dit_accel.preset import load_preset

RESULTS = Path(__file__).parents[2] / "scripts" / "results"
RECORDS = ("bench_region_full_h200.json", "bench_region_flux_1024_h200.json")
BOUND = 0.15
DENSE = {"flux": "flux-dense", "wan": "wan21-dense"}


def runs() -> dict[str, tuple[dict[str, Any], str]]:
    """Every run of the records, by name: its case and variant."""
    return {
        f"{name.removesuffix('_h200.json')} {case['case']} {variant}": (case, variant)
        for name in RECORDS
        for case in json.loads((RESULTS / name).read_text(encoding="utf-8"))["cases"]
        for variant in case["variants"]
    }


def told_of(case: dict[str, Any], variant: str) -> Estimate:
    """The estimate of what ran: one branch, a schedule shifted by 3."""
    told, size = case["variants"][variant], CASES[case["case"]]
    name = variant.partition(",")[0] if told["sparse"] else DENSE[case["case"].partition("-")[0]]
    values = {
        "model": case["model"],
        "generate.width": size.width,
        "generate.height": size.height,
        "generate.frames": size.frames,
        "generate.steps": case["steps"],
        "generate.guidance": 1.0,
        "generate.flow_shift": 3.0,
    }
    if told["options"]:
        values |= {f"region.{key}": told["options"][key] for key in ("sample_ratio", "unit", "start", "error_reset")}
    return estimate(load_preset(name).with_values(values, "test"))


@pytest.mark.parametrize("name", runs())
def test_a_generation_is_within_15_percent_of_the_record(name: str) -> None:
    case, variant = runs()[name]
    told, found = case["variants"][variant], told_of(case, variant)
    seconds = found.fast_seconds / told["transformer_seconds"] - 1
    gain = found.gain / told["times_as_fast"] - 1
    print(f"{name}: seconds {seconds:+.1%}, gain {gain:+.1%}")
    assert abs(seconds) <= BOUND and abs(gain) <= BOUND
    assert found.region_steps == told["part_forwards"]
    noisy = [count for reason, count in told["dense_reasons"].items() if reason.startswith("noise level above")]
    if told["sparse"]:
        layers = CASES[case["case"]].layers
        assert (found.steps - found.sparse_steps) * sum(layers.values()) == sum(noisy)
    memory = found.memory.activations + found.memory.region + found.memory.plans
    assert memory == pytest.approx(told["peak_bytes"], rel=BOUND)
