"""Plan: what a tuning measures, and on what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.options import SparseOptions
from dit_accel.preset import Preset
from dit_accel.tuning.as_preset import load, to_toml
from dit_accel.tuning.runs import Clip


@dataclass(frozen=True)
class Plan:
    """What to measure, and on what."""

    base: Preset  # its recipe and sampling are used
    methods: tuple[SparseOptions, ...]  # without a schedule of their own
    keeps: tuple[float, ...]  # the largest first
    clips: tuple[Clip, ...]  # to tune on
    held_out: tuple[Clip, ...]
    cache: bool  # whether steps may be made up
    buckets: int  # parts of the noise levels that have keeps of their own
    close: int  # steps looked at closely
    perturbed: int  # steps at which runs go wrong on purpose
    polish: int = 12  # allocations, at most, that are tried for real next to the best schedule
    follow: bool = False  # whether every layer, sparse alone, is followed to the end of each clip tuned on

    @property
    def dense(self) -> Preset:
        """The base with nothing of ours."""
        told = {"pipeline": self.base.pipeline, "model": self.base.model}
        told["generate"] = dataclasses.asdict(self.base.generate)
        return load(to_toml("dense", told), "dense", "tune")

    def carrying(self, method: int, options: Mapping[str, Any]) -> Plan:
        """The same with other options of one method, by which its plans are carried over."""
        methods = list(self.methods)
        methods[method] = methods[method].merged(dict(options))
        return dataclasses.replace(self, methods=tuple(methods))

    def settings(self, machine: dict[str, Any]) -> dict[str, Any]:
        """What measurements depend on; a budget is no part of it."""
        return {
            "model": self.base.model,
            "pipeline": self.base.pipeline,
            "generate": dataclasses.asdict(self.base.generate),
            "methods": [options.to_mapping() for options in self.methods],
            "keeps": self.keeps,
            "prompts and seeds": [dataclasses.asdict(clip) for clip in self.clips],
            "held-out prompts and seeds": [dataclasses.asdict(clip) for clip in self.held_out],
            "steps looked at, and perturbed behind the first": [self.close, self.perturbed],
            "followed in parts": self.buckets if self.follow else None,
            "machine": machine,
        }
