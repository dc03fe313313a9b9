"""Time one forward of full-size transformers with random weights: stock diffusers against sparse attention.

    python scripts/bench_pipeline.py --scenarios wan-14b-720p flux-4096 --keeps 0.25 0.1 --out results.json
    python scripts/bench_pipeline.py --report results.json more.json

Weights are random, so this says how long a forward takes and nothing about quality; content decides which blocks are
read, not how many, so that the time is that of trained weights at equal keep. Dense is stock diffusers with the backend
it chooses. All variants of a scenario take turns in one run; the figures are medians of the rounds, with the quartiles.

Before anything is timed, attention that keeps everything must equal stock diffusers on a small grid, as nearly as
another dense kernel does; a scenario that fails prints nothing but that. Inside one middle layer of a forward, dense
attention and sparse attention with its prediction are timed by themselves: their share of a forward follows.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _source_tree  # noqa: F401  (must come before dit_accel)
import torch
from _full_size import SCENARIOS, Scenario
from _quality_record import describe_environment
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel import SparseProcessor
from dit_accel.preset import parse_setting

DENSE = "stock diffusers"
_NEAR = 3  # times as far from stock as another dense kernel is
_FLOOR = 1e-6  # relative; two kernels may agree to the last bit


@dataclass(frozen=True)
class Variant:
    """Sparse attention with some options, or stock diffusers (none)."""

    name: str
    options: dict[str, Any] | None


def main() -> None:
    options = read_options()
    if options.report:
        records = [json.loads(Path(path).read_text()) for path in options.report]
        print_report([result for record in records for result in record["results"]])
        return
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    results = []
    record = {"environment": describe_environment(device), "options": vars(options), "results": results}
    record["environment"]["command"] = _command()
    failed = []
    for name in options.scenarios:
        try:
            results.append(time_scenario(name, SCENARIOS[name], options, device, dtype))
        except WrongResult as wrong:
            failed.append(f"{name}: {wrong}")
            print(f"{name}: WRONG, not timed: {wrong}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.out and results:
            write(Path(options.out), record)
    print_report(results)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(options.scenarios)} scenarios gave wrong results")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME",
                        help=f"of {', '.join(SCENARIOS)} (all)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=["pooled"], help="sparse methods (pooled)")
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.25, 0.1])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of every variant")
    parser.add_argument("--share", type=float, default=1.0, help="share of the model's blocks to build (1)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each variant is timed (5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="heads of 16, small grids: tries the script on a CPU")
    parser.add_argument("--out", help="file for the record")
    parser.add_argument("--report", nargs="+", metavar="RECORD", help="print the table of records")
    return parser.parse_args()


class WrongResult(Exception):
    """Attention that keeps everything differs from stock diffusers."""


def time_scenario(
    name: str, scenario: Scenario, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Check, then time every variant of one scenario. Raises WrongResult."""
    began = time.monotonic()
    tiny = _tiny(scenario) if options.tiny else {}
    transformer = scenario.build(device, dtype, options.share, **tiny)
    given = dict(parse_setting(text) for text in options.set)
    checked = check(scenario, transformer)
    inputs = scenario.arguments(transformer, small=options.tiny)
    variants = [Variant(DENSE, None)] + [
        Variant(f"{method}, keep {keep:g}", {"method": method, "keep": keep, "min_tokens": 0, **given})
        for method in options.methods
        for keep in options.keeps
    ]
    rounds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    facts: dict[str, dict[str, Any]] = {}
    for round_ in range(options.rounds):
        for variant in variants:
            seconds, facts[variant.name] = time_variant(transformer, inputs, variant, first=round_ == 0)
            rounds[variant.name].append(seconds)
    attention = time_attention(transformer, inputs, variants[1:])
    blocks = sum(max(1, round(n * options.share)) for n in scenario.layers.values())
    dense = statistics.median(rounds[DENSE])
    result = {
        "scenario": name,
        "title": scenario.title + (", tiny" if options.tiny else ""),
        "blocks": [blocks, sum(scenario.layers.values())],
        "tokens": facts[variants[1].name]["tokens"],
        "check": checked,
        "attention": attention,
        "variants": {
            variant.name: {
                "milliseconds": [1000 * x for x in rounds[variant.name]],
                "faster": dense / statistics.median(rounds[variant.name]),
                **facts[variant.name],
            }
            for variant in variants
        },
    }
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return result


def check(scenario: Scenario, transformer: nn.Module) -> dict[str, float]:
    """Relative distances from stock diffusers of sparse attention that keeps all, and of another dense kernel."""
    inputs = scenario.arguments(transformer, small=True)
    true = forward(transformer, inputs)
    with sdpa_kernel(SDPBackend.MATH):
        other = forward(transformer, inputs)
    processor = install(transformer, {"method": "pooled", "keep": 1.0, "min_tokens": 0, "strict": True})
    try:
        ours = forward(transformer, inputs)
        if processor.report.dense_calls or not processor.report.sparse_calls:
            raise WrongResult("attention that keeps everything ran dense")
    finally:
        processor.remove()
    distance, floor = (float((x.double() - true.double()).norm() / true.double().norm()) for x in (ours, other))
    if not distance <= _NEAR * max(floor, _FLOOR):
        raise WrongResult(f"keeping all is {distance:.2g} from stock diffusers, another dense kernel {floor:.2g}")
    return {"keep_all": distance, "another_dense_kernel": floor}


def install(transformer: nn.Module, options: dict[str, Any]) -> SparseProcessor:
    """Make a transformer's attention sparse."""
    options = dict(options)
    processor = SparseProcessor(transformer, options.pop("method"), **options)
    transformer.set_attn_processor(processor)
    return processor


@torch.no_grad()
def forward(transformer: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return transformer(**inputs, return_dict=False)[0]


def time_variant(
    transformer: nn.Module, inputs: dict[str, Any], variant: Variant, *, first: bool
) -> tuple[float, dict[str, Any]]:
    """Seconds of one forward after a warm-up, and what is known of it."""
    device = next(transformer.parameters()).device
    processor = None if variant.options is None else install(transformer, variant.options)
    try:
        for _ in range(2 if first else 1):
            forward(transformer, inputs)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(lambda: forward(transformer, inputs), device)
        facts: dict[str, Any] = {}
        if device.type == "cuda":
            facts["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        if processor is not None:
            report = processor.report
            facts["keep_achieved"] = report.keep_achieved
            facts["calls"] = {"sparse": report.sparse_calls, "dense": report.dense_calls}
            facts["dense_reasons"] = dict(report.dense_reasons)
            facts["executor"] = list(report.executors)
            facts["tokens"] = processor.engine.layout.n_tokens if processor.engine.layout else None
        return seconds, facts
    finally:
        if processor is not None:
            processor.remove()


def time_attention(
    transformer: nn.Module, inputs: dict[str, Any], variants: list[Variant], calls: int = 5
) -> dict[str, dict[str, float]]:
    """Milliseconds of one middle layer's attention, inside a forward: dense as diffusers would, and by each variant."""
    found = {}
    for variant in variants:
        processor = install(transformer, variant.options)
        try:
            probe = _Probe(processor.engine, calls)
            forward(transformer, inputs)
            found[variant.name] = probe.milliseconds
        finally:
            processor.remove()
    return found


class _Probe:
    """Times one layer's attention when it comes to it, again and again, dense and sparse by turns."""

    def __init__(self, engine: Any, calls: int) -> None:
        self.attend, self.layer, self.calls = engine.attend, engine.n_layers // 2, calls
        self.milliseconds: dict[str, float] = {}
        engine.attend = self

    def __call__(self, seat: Any, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        if seat.layer == self.layer and not self.milliseconds:
            ways = {
                "dense": lambda: seat.dense(query, key, value, **call),
                "sparse": lambda: self.attend(seat, query, key, value, **call),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for round_ in range(self.calls + 1):
                for name, run in ways.items():
                    seconds = timed(run, query.device)
                    if round_:
                        times[name].append(1000 * seconds)
            self.milliseconds = {name: statistics.median(some) for name, some in times.items()}
        return self.attend(seat, query, key, value, **call)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def print_report(results: list[dict[str, Any]]) -> None:
    """A table: for each scenario stock diffusers, then its variants."""
    table = Table("scenario", "variant", "forward", "times as fast", "attention of a layer", "peak memory")
    for result in results:
        built, there = result["blocks"]
        part = "" if built == there else f" ({built} of {there} blocks)"
        for name, variant in result["variants"].items():
            times = variant["milliseconds"]
            quarter = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
            layer = result["attention"].get(name)
            if layer:
                told = f"{layer['sparse']:.2f} ms, dense {layer['dense']:.2f}"
            else:
                dense = statistics.median(each["dense"] for each in result["attention"].values())
                calls = next(v["calls"] for v in result["variants"].values() if "calls" in v)
                layers = sum(calls.values()) / _forwards(result)
                told = f"{layers * dense / statistics.median(times):.0%} of the forward"
            peak = f"{variant['peak_gib']:.1f} GiB" if "peak_gib" in variant else ""
            first = name == DENSE
            table.add_row(
                f"{result['title']}{part}, {result['tokens']:,} tokens" if first else "",
                name,
                f"{statistics.median(times):.1f} ms ({quarter[0]:.1f} to {quarter[2]:.1f})",
                "" if first else f"{variant['faster']:.2f}",
                told,
                peak,
            )
    Console(width=180).print(table)


def _forwards(result: dict[str, Any]) -> int:
    """Forwards whose calls a variant's last round counted: a warm-up, or two in the first round, then one timed."""
    rounds = len(next(iter(result["variants"].values()))["milliseconds"])
    return 3 if rounds == 1 else 2


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(path)


def _command() -> str:
    import sys

    return " ".join(["python", "scripts/bench_pipeline.py", *sys.argv[1:]])


def _tiny(scenario: Scenario) -> dict[str, Any]:
    """What makes any of these models small: two heads of 16 and one or two blocks."""
    own: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, **dict.fromkeys(scenario.layers, 1)}
    more = {
        "ffn_dim": 64,
        "text_dim": 32,
        "text_embed_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "caption_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
        "rope_axes_dim": (4, 6, 6),
    }
    return own | {name: value for name, value in more.items() if name in scenario.config}


if __name__ == "__main__":
    main()
