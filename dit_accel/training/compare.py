"""What training is worth: the velocity error of several ways to attend, against the dense model, at equal latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.engine import Engine
from dit_accel.forwards import method_of
from dit_accel.handle import set_processor
from dit_accel.options import SparseOptions
from dit_accel.processor import SparseProcessor
from dit_accel.report import Report, Tally
from dit_accel.sla.spec import SlaSpec, file_for, read_spec, untrained_layers
from dit_accel.training.draws import spread_levels
from dit_accel.training.guidance import Guidance
from dit_accel.training.samples import LatentFolder
from dit_accel.training.velocity import VelocityError, make_cases, measure_aims
from dit_accel.trajectory import Trajectory


@dataclass(frozen=True)
class Compared:
    """One way to attend: its options, how far its velocity is from dense, and what ran."""

    options: Mapping[str, Any]
    error: VelocityError
    report: Report

    def to_dict(self) -> dict[str, Any]:
        return {"options": dict(self.options), "error": self.error.to_dict(), "report": self.report.to_dict()}


def ways_to_attend(keep: float, arrangement: Mapping[str, Any], file: Path | None = None) -> dict[str, dict[str, Any]]:
    """Options of the training-free methods at this share of key blocks and, with a side file, of the trained one.

    Args:
        keep: of the training-free ones; the trained one reads as many blocks as it was trained with.
        arrangement: order, block, tile.
        file: a side file. Layers that it has no weights of are dense in every way.
    """
    dense = untrained_layers(file) if file is not None else ()
    same = {"dense_layers": list(dense)} if dense else {}
    ways = {
        "pooled": {"method": "pooled", "keep": keep, **arrangement, **same},
        "sla, untrained": {"method": "sla", "keep": keep, **arrangement, **same},
    }
    if file is not None:
        ways["sla, trained"] = {"method": "sla", "weights": str(file), **same}
    return ways


def ways_of_file(file: Path, role: str = "transformer") -> dict[str, dict[str, Any]]:
    """`ways_to_attend` with everything equal to what a side file, or one in a folder, was trained for."""
    file = file_for(file, role)
    spec: SlaSpec = read_spec(file)
    return ways_to_attend(spec.keep, {"order": spec.order, "block": spec.block, "tile": spec.tile}, file)


def share_plans(ways: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same ways with one plan for both branches, the conditional one's."""
    return {f"{name}, shared plans": {**options, "share_plans": True} for name, options in ways.items()}


@torch.no_grad()
def compare_ways(
    transformer: nn.Module,
    ways: Mapping[str, Mapping[str, Any]],
    folder: LatentFolder,
    places: Sequence[int],
    *,
    levels: int,
    seed: int,
    role: str = "transformer",
    below: float = 1.0,
    guidance: Guidance | None = None,
    after: Callable[[str], None] | None = None,
) -> dict[str, Compared]:
    """Measure every way to attend on one transformer, which is as it was afterwards.

    Dense velocities are computed once and kept in main memory.

    Args:
        ways: sparse options by name; layers that cannot be sparse are an error.
        places: of the folder's samples.
        levels: how many noise levels of the folder's schedule.
        role: which transformer of its pipeline it is.
        below: the highest noise level to look at.
        guidance: with it the guided velocity is compared, too.
        after: called with the name of each way that is measured, "dense" first.
    """
    device, schedule = next(transformer.parameters()).device, folder.index.part(role).below(below)
    chosen, trajectory = spread_levels(schedule, levels), Trajectory()  # each way has a clock of its own in its place

    def cases():
        told = dict(device=device, dtype=transformer.dtype, seed=seed, guidance=guidance)
        for case in make_cases(folder, places, chosen, **told):
            if case.first:
                trajectory.begin()  # a plan that branches share is of one x_t
            yield case

    def velocity(inputs: dict[str, Any]) -> torch.Tensor:
        return transformer(**inputs)[0]

    aims = [velocity(case.inputs).cpu() for case in cases()]
    found: dict[str, Compared] = {}
    if after is not None:
        after("dense")
    for name, options in ways.items():
        sparse = SparseOptions.from_mapping({"min_tokens": 0, "strict": True, **options})
        trajectory = Trajectory()
        engine = Engine(transformer, sparse, method_of(sparse), trajectory, Tally.of(trajectory), role)
        try:
            set_processor(transformer, SparseProcessor.of(engine))
            error = measure_aims(cases(), velocity, aims, chosen, device=device)
            found[name] = Compared(options, error, engine.report())
        finally:
            engine.remove()
        if after is not None:
            after(name)
    return found
