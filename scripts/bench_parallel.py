"""Time full-size forwards that several GPUs share (Ulysses), dense and sparse, beside one GPU: random weights.

    torchrun --nproc-per-node 2 scripts/bench_parallel.py --cases wan-1.3b-480p --keeps 0.25 --out parallel.json
    torchrun --nproc-per-node 2 scripts/bench_parallel.py --tiny          # the same code in a moment, on a CPU

Every process holds the model twice: alone, and with diffusers' context parallelism. Before anything is timed, on a
smaller grid, reading everything through the sparse kernel of the shared model must equal dense attention of the model
alone, as nearly as dense attention by another kernel does; else the exit code is 1. Forwards run in turns, and the
slowest process counts. Cases whose dense forward takes long have fewer layers here, and are marked: their times are as
measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import _source_tree  # noqa: F401  (must come before dit_accel)
import torch
from _forward_times import CHECK_GRID, installed, judge_full_plan, relative_error
from _full_size import CASES, FullSize, at_noise, build_transformer, make_inputs
from _pages import write_text
from _quality_record import describe_environment
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.bench.stopwatch import seconds_of
from dit_accel.options import SparseOptions

NOISE = 0.5


def main() -> int:
    options = read_options()
    cpu = options.tiny or not torch.cuda.is_available()
    distributed.init_process_group("gloo" if cpu else "nccl")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cpu") if cpu else torch.device("cuda", rank)
    dtype = torch.float32 if cpu else torch.bfloat16
    if not cpu:
        torch.cuda.set_device(device)
    try:
        cases = [time_case(CASES[name], device, dtype, options) for name in options.cases]
        gc.collect()  # models are in cycles with their hooks, and must not be the last to hold a group
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    if rank > 0:
        return 0
    for told in cases:
        print_case(told)
    record = {
        "environment": {**describe_environment(device), "processes": world, "backend": "gloo" if cpu else "nccl"},
        "weights": "random",
        "dtype": str(dtype).removeprefix("torch."),
        "noise": NOISE,
        "cases": cases,
    }
    if options.out:
        write_text(options.out, json.dumps(record, indent=1) + "\n")
    problems = [told["problem"] for told in cases if told["problem"]]
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


def read_options() -> argparse.Namespace:
    shared = [name for name, case in CASES.items() if case.transformer == "WanTransformer3DModel"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=shared, default=shared[:1], help="(%(default)s)")
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.25], help="of method pooled (0.25)")
    parser.add_argument("--rounds", type=int, default=5, help="forwards of each, in turns (5)")
    parser.add_argument("--tiny", action="store_true", help="a small model and grid, on a CPU: tries the script")
    parser.add_argument("--out", type=Path, help="write the JSON record here")
    options = parser.parse_args()
    if options.rounds < 1 or not all(0 < keep <= 1 for keep in options.keeps):
        parser.error("--rounds is at least 1, --keeps above 0 and up to 1")
    if not distributed.is_torchelastic_launched():
        parser.error("one process shares with none: start it with torchrun --nproc-per-node 2, or more")
    return options


@torch.no_grad()
def time_case(case: FullSize, device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Everything there is to tell of a case; `problem` is a sentence where it is not right, and nothing is timed."""
    case = case.made_tiny() if options.tiny else case
    build = partial(build_transformer, case, device, dtype, whole=not case.shallow)
    models = {"alone": build(), "shared": split(build(), device)}
    inputs = at_noise(case, make_inputs(case, case.grid, device, dtype), NOISE)
    common = {"min_tokens": 0, "strict": True, **({"block": 16} if options.tiny else {})}
    variants: dict[str, SparseOptions | None] = {"dense": None}
    variants |= {f"keep {keep:g}": SparseOptions(method="pooled", keep=keep, **common) for keep in options.keeps}
    told = {
        "case": case.name,
        "model": case.model,
        "size": [case.frames, case.height, case.width],
        "grid": list(case.grid),
        "layers": len(models["alone"].blocks),
        "layers_published": case.config["num_layers"],
        **check(case, models, SparseOptions(method="pooled", keep=1.0, **common), device, dtype),
    }
    if told["problem"]:
        return told
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(-1, options.rounds):  # the first round warms up
        for name, sparse in variants.items():
            for where, model in models.items():
                spent = slowest(take(model, sparse, inputs, device), device)
                if number >= 0:
                    seconds.setdefault((name, where), []).append(spent)
    told["variants"] = {name: describe(name, seconds) for name in variants}
    for name, sparse in variants.items():
        told["variants"][name]["difference"] = slowest(
            relative_error(*(run(model, sparse, inputs)[0] for model in (models["shared"], models["alone"]))), device
        )
    return told


def split(transformer: nn.Module, device: torch.device) -> nn.Module:
    """The transformer with diffusers' Ulysses over all processes."""
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(ulysses_degree=distributed.get_world_size())
    if device.type == "cuda":
        transformer.enable_parallelism(config=config)
        return transformer
    # diffusers looks for an accelerator, and divides by how many there are
    shape, names = config.mesh_shape, config.mesh_dim_names
    config.mesh = distributed.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
    with patch("torch.accelerator.device_count", return_value=1):
        transformer.enable_parallelism(config=config)
    return transformer


def run(transformer: nn.Module, sparse: SparseOptions | None, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The velocity, and the report of sparse attention."""
    with installed(transformer, sparse) as processor:
        out = transformer(**inputs)[0].clone()
        return out, None if processor is None else processor.report


def take(transformer: nn.Module, sparse: SparseOptions | None, inputs: dict[str, Any], device: torch.device) -> float:
    """Seconds of a forward, of all processes at once."""
    with installed(transformer, sparse):
        if sparse is not None:
            transformer(**inputs)[0].clone()
        distributed.barrier()
        # it ends with a gather that nothing has waited for; any operation does
        return seconds_of(lambda: transformer(**inputs)[0].clone(), device)


def slowest(figure: float, device: torch.device) -> float:
    """The largest of all processes' figures."""
    all_of_them = torch.tensor(figure, dtype=torch.float64, device=device)
    distributed.all_reduce(all_of_them, op=distributed.ReduceOp.MAX)
    return all_of_them.item()


def check(
    case: FullSize, models: dict[str, nn.Module], full: SparseOptions, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Whether a full plan of the shared model equals dense attention of the model alone."""
    grid = tuple(min(n, most) for n, most in zip(case.grid, CHECK_GRID, strict=True))
    inputs = at_noise(case, make_inputs(case, grid, device, dtype), NOISE)
    expected, _ = run(models["alone"], None, inputs)
    with sdpa_kernel(SDPBackend.MATH):
        floor = relative_error(run(models["alone"], None, inputs)[0], expected)
    stock = slowest(relative_error(run(models["shared"], None, inputs)[0], expected), device)
    out, report = run(models["shared"], full, inputs)
    error = slowest(relative_error(out, expected), device)
    told = judge_full_plan(error, floor, dtype, report)
    problem = told.pop("problem")
    found = {"grid": list(grid), "stock_shared": stock, "executors": dict(report.executors)}
    return {"check": {**found, **told}, "problem": problem}


def describe(name: str, seconds: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """Medians, and how many times as fast as the model alone, and as dense attention likewise split."""
    alone, shared = seconds[name, "alone"], seconds[name, "shared"]
    dense = {where: seconds["dense", where] for where in ("alone", "shared")}

    def ratio(slow: list[float], fast: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(slow, fast, strict=True))

    return {
        "seconds_alone": statistics.median(alone),
        "seconds_alone_each": alone,
        "seconds_shared": statistics.median(shared),
        "seconds_shared_each": shared,
        "times_as_fast_shared": ratio(alone, shared),
        "times_as_fast_as_dense_alone": ratio(dense["alone"], alone),
        "times_as_fast_as_dense_shared": ratio(dense["shared"], shared),
        "times_as_fast_as_dense_by_one": ratio(dense["alone"], shared),
    }


def print_case(told: dict[str, Any]) -> None:
    layers = told["layers"], told["layers_published"]
    depth = "" if layers[0] == layers[1] else f", {layers[0]} of {layers[1]} layers"
    checked = told["check"]
    print(
        f"{told['case']}: grid {'x'.join(map(str, told['grid']))}{depth}; a full plan is {checked['error']:.1e} from "
        f"dense alone, stock shared {checked['stock_shared']:.1e}, another kernel {checked['floor']:.1e}"
    )
    if told["problem"]:
        return
    print(f"  {'':12}{'alone ms':>10}{'shared ms':>11}{'gain':>8}{'dense/it alone':>16}{'shared':>8}{'of both':>9}")
    for name, one in told["variants"].items():
        print(
            f"  {name:12}{one['seconds_alone'] * 1e3:10.1f}{one['seconds_shared'] * 1e3:11.1f}"
            f"{one['times_as_fast_shared']:7.2f}x{one['times_as_fast_as_dense_alone']:15.2f}x"
            f"{one['times_as_fast_as_dense_shared']:7.2f}x{one['times_as_fast_as_dense_by_one']:8.2f}x"
        )
        spread = ((min(x), max(x)) for x in (one["seconds_alone_each"], one["seconds_shared_each"]))
        told_spread = ", ".join(f"{low * 1e3:.1f} to {high * 1e3:.1f}" for low, high in spread)
        print(f"  {'':12}spread {told_spread}; shared is {one['difference']:.1e} from alone")


if __name__ == "__main__":
    sys.exit(main())
