"""What the records tell of forwards and region steps, beside what the estimate counts for them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dit_accel.estimate.architectures import PUBLISHED
from dit_accel.estimate.count import Work, count_forward
from dit_accel.estimate.full_size import DEPTHS
from dit_accel.estimate.gpus import Gpu
from dit_accel.estimate.keeping import sparse_call
from dit_accel.estimate.timing import Sparse, region_times
from dit_accel.options import SparseOptions
from dit_accel.region.options import load_region
from dit_accel.region.steps import count_active

RESULTS = Path(__file__).parent / "results"
PIPELINES = ("bench_pipeline_h200.json", "bench_pipeline_flux_h200.json")
KERNELS = ("bench_kernels_h200.json", "bench_kernels_dense_h200.json")
REGION_FIT = "bench_region_full_h200.json"
REGIONS = (REGION_FIT, "bench_region_flux_1024_h200.json")


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


class Case:
    """A forward that was timed, as it was built: `work` of that many layers, `whole` of all."""

    def __init__(self, record: str, told: Mapping[str, Any], variant: str) -> None:
        self.record, self.case, self.variant = record, told["case"], variant
        self.told = told["variants"][variant]
        self.model = PUBLISHED[told["model"]]
        self.grid = tuple(told["grid"])
        built = {DEPTHS[name]: depth for name, depth in told["layers_built"].items()}
        self.built: Work = count_forward(self.model, self.grid, batch=told["batch"], layers=built)
        self.whole: Work = count_forward(self.model, self.grid, batch=told["batch"])
        attention = sum(self.told["attention_ms_each"])
        self.attention = attention
        self.other = attention / self.told["attention_share"] - attention
        self.predict = self.told["predict_ms_per_layer"] * len(self.told["attention_ms_each"])
        self.sparse: Sparse | None = None
        if "options" in self.told:
            self.options = SparseOptions.from_mapping(self.told["options"])
            text = 0 if not self.whole.text else told["text"]
            self.sparse, self.keep = sparse_call(self.options, self.options.keep, self.grid, text)

    @property
    def name(self) -> str:
        return f"{self.record.removesuffix('.json')}: {self.case}, {self.variant}"

    def layers(self, work: Work) -> list[Sparse | None]:
        """Which layers are sparse."""
        if self.sparse is None:
            return [None] * work.layers
        dense = {layer % work.layers for layer in self.options.dense_layers}
        return [None if layer in dense else self.sparse for layer in range(work.layers)]

    def sparse_sum(self) -> float:
        """Milliseconds of the sparse calls, plans included."""
        each = self.told["attention_ms_each"]
        return sum(ms for ms, layer in zip(each, self.layers(self.built), strict=True) if layer is not None)


def cases() -> list[Case]:
    return [
        Case(name, told, variant)
        for name in PIPELINES
        for told in read(name)["cases"]
        for variant in told["variants"]
    ]


class RegionCase:
    """A step that computed a part of the tokens."""

    def __init__(self, record: str, told: Mapping[str, Any], variant: str) -> None:
        self.record, self.case, self.variant = record, told["case"], variant
        one = told["variants"][variant]
        case = next(each for each in cases() if each.case == told["case"] and each.sparse is None)
        self.whole = case.whole
        region = load_region({key: value for key, value in one["options"].items() if key != "mask"})
        self.by_blocks = region.unit == "block"
        active = count_active(region, self.whole.tokens)
        self.part = count_forward(case.model, (1, 1, active), batch=told["batch"])
        self.ms = one["part_ms"]
        self.layers: list[Sparse | None] = [None] * self.whole.layers
        if one["sparse"]:
            options = SparseOptions.from_mapping(one["sparse"])
            call, _ = sparse_call(options, options.keep, case.grid, self.whole.text)
            dense = {layer % self.whole.layers for layer in options.dense_layers}
            self.layers = [None if layer in dense else call for layer in range(self.whole.layers)]

    @property
    def name(self) -> str:
        return f"{self.record.removesuffix('.json')}: {self.case}, {self.variant}"

    def estimate(self, gpu: Gpu) -> float:
        return region_times(self.whole, self.part, gpu, self.layers, by_blocks=self.by_blocks).total


def region_cases(records: Collection[str] = REGIONS) -> list[RegionCase]:
    return [
        RegionCase(name, told, variant)
        for name in records
        for told in read(name)["cases"]
        for variant, one in told["variants"].items()
        if one["part_ms"] is not None
    ]
