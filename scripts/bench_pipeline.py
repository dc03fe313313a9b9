"""Time one forward of full-size transformers, dense and sparse in turns: random weights, so speed and never quality.

    python scripts/bench_pipeline.py --out full.json                             # every case with its presets
    python scripts/bench_pipeline.py --cases flux-2048 --methods pooled sparge --keeps 0.5 0.25 --out flux.json
    python scripts/bench_pipeline.py --report full.json flux.json --docs docs/full-size.md
    python scripts/bench_pipeline.py --tiny                                      # the same code in a moment, on a CPU

Dense is stock diffusers with the attention it chooses itself. A sparse variant is a step and layers of a preset that
are sparse; its dense steps are not in it, nor is its lower bound of tokens. Before anything is timed, every arrangement
of tokens is checked on a smaller grid: reading everything through the sparse kernel must equal dense, as nearly as
dense attention by another kernel does; else the variant is not timed and the exit code is 1.

Cases whose dense forward takes long are built with fewer layers, unless --whole is given. Their times are scaled to the
published depth by the time of each kind of block, and marked; a preset's dense layers are left out of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import _source_tree  # noqa: F401  (must come before dit_accel)
import torch
from _forward_times import (
    CHECK_GRID,
    Sample,
    Variant,
    installed,
    judge_full_plan,
    relative_error,
    take_sample,
    watch_forward,
)
from _full_size import CASES, DEPTHS, FullSize, at_noise, build_transformer, make_inputs
from _pages import put_between, write_text
from _quality_record import describe_environment
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.errors import DitAccelError
from dit_accel.options import SparseOptions
from dit_accel.preset import load_preset


def main() -> int:
    options = read_options()
    if options.report:
        write_report([json.loads(Path(path).read_text()) for path in options.report], options.docs)
        return 0
    began = time.monotonic()
    device = torch.device(
        options.device or ("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    )
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    record = {
        "environment": {**describe_environment(device), "command": " ".join(["python", *sys.argv])},
        "weights": "random",
        "dtype": str(dtype).removeprefix("torch."),
        "noise": options.noise,
        "tiny": options.tiny,
        "cases": [],
        "failed": [],  # cases and variants that were not timed, and why
    }
    for case in chosen_cases(options.cases):
        if options.seconds and time.monotonic() - began > options.seconds:
            record["failed"].append({"case": case.name, "problem": "no time was left"})
            continue
        case = case.made_tiny() if options.tiny else case
        try:
            told = time_case(case, device, dtype, options, began, record["failed"])
        except (DitAccelError, torch.OutOfMemoryError) as error:
            record["failed"].append({"case": case.name, "problem": str(error).splitlines()[0]})
        else:
            record["cases"].append(told)
            print_case(told)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.out:  # after every case: a run that is cut short leaves what it has
            write_text(Path(options.out), json.dumps(record, indent=1) + "\n")
    for one in record["failed"]:
        print(f"NOT TIMED {one['case']} {one.get('variant', '')}: {one['problem']}")
    return 1 if record["failed"] else 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", help=f"some of {', '.join(CASES)}; default: all")
    parser.add_argument("--presets", nargs="+", help="instead of those made for the case")
    parser.add_argument("--methods", nargs="+", help="these instead of presets, at each of --keeps")
    parser.add_argument("--keeps", nargs="+", type=float, help="these instead of presets (method pooled)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a sparse option of every variant"
    )
    parser.add_argument("--rounds", type=int, default=5, help="forwards of each variant, in turns (5)")
    parser.add_argument("--noise", type=float, default=0.5, help="noise level of the forwards (0.5)")
    parser.add_argument("--whole", action="store_true", help="all layers, also where fewer would be scaled")
    parser.add_argument("--seconds", type=float, help="begin no case and no round later than this")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: float32 on a CPU"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small models and grids, on a CPU: tries the script"
    )
    parser.add_argument("--out", help="write the JSON record here")
    parser.add_argument("--report", nargs="+", metavar="RECORD", help="make the table of records")
    parser.add_argument("--docs", help="where --report puts it, between its marks; default: the terminal")
    options = parser.parse_args()
    if options.presets and (options.methods or options.keeps):
        parser.error("give either --presets or --methods and --keeps")
    if options.rounds < 1 or not 0.1 <= options.noise <= 0.9:
        parser.error("--rounds is at least 1, --noise from 0.1 to 0.9")
    return options


def chosen_cases(names: list[str] | None) -> list[FullSize]:
    """The cases of these names, or all.

    Raises:
        SystemExit: a name that is none.
    """
    for name in names or ():
        if name not in CASES:
            raise SystemExit(f"no case {name!r}; there are {', '.join(CASES)}")
    return [CASES[name] for name in names or CASES]


def variants_of(case: FullSize, options: argparse.Namespace, whole: bool) -> list[Variant]:
    """Dense, and each sparse variant with what of it does not hold in a single forward taken away."""
    from evaluate_quality import parse_value

    changes = {key: parse_value(value) for key, value in (item.split("=", 1) for item in options.set)}
    always = {"dense_above": 1.0, "dense_below": 0.0, "dense_first": 0.0, "min_tokens": 0}
    # of a preset made for a full-size model; a tiny one keeps its size apart from blocks
    small = {"block": 16} if options.tiny else {}
    found = [Variant("dense")]
    if options.methods or options.keeps:
        for method in options.methods or ["pooled"]:
            for keep in options.keeps or [None]:
                asked = {
                    "method": method,
                    **({} if keep is None else {"keep": keep}),
                    **always,
                    **small,
                    **changes,
                }
                name = method if keep is None else f"{method}@{keep:g}"
                found.append(Variant(name, SparseOptions.from_mapping(asked), "given"))
        return found
    for name in options.presets or case.presets:
        preset = load_preset(name)
        if preset.sparse is None:
            raise SystemExit(
                f"preset {name} is dense, and dense is timed anyway; choose one with sparse options"
            )
        layers = len(preset.sparse.dense_layers)
        shallow = {} if whole and not options.tiny else {"dense_layers": ()}
        dropped = ("dense steps", *(("dense layers",) if shallow and layers else ()))
        sparse = preset.sparse.merged({**always, **shallow, **small, **changes})
        found.append(Variant(name, sparse, f"preset {name}, {preset.status}", dropped))
    return found


def time_case(
    case: FullSize,
    device: torch.device,
    dtype: torch.dtype,
    options: argparse.Namespace,
    began: float,
    failed: list[dict],
) -> dict[str, Any]:
    """Everything there is to tell of a case.

    Args:
        began: when the script did, by the monotonic clock.
        failed: takes what was not timed.

    Raises:
        DitAccelError: a model of no known family, options that cannot be.
        torch.OutOfMemoryError: the device is too small.
    """
    whole = options.whole or not case.shallow
    variants = variants_of(case, options, whole)
    transformer = build_transformer(case, device, dtype, whole=whole)
    lists = tuple(name for name in DEPTHS if hasattr(transformer, name))
    full = {name: case.layers[DEPTHS[name]] for name in lists}
    built = {name: len(getattr(transformer, name)) for name in lists}
    tokens = math.prod(case.grid)
    made = make_inputs(case, case.grid, device, dtype)
    inputs = partial(at_noise, case, made)
    checks = {}
    with torch.no_grad():
        for variant in list(variants):
            if variant.options is not None:
                told = check(case, transformer, variant, device, dtype, options.noise)
                checks[variant.name] = told
                if told["problem"]:
                    failed.append({"case": case.name, "variant": variant.name, "problem": told["problem"]})
                    variants.remove(variant)
        if len(variants) == 1:
            raise DitAccelError("no variant is right here, so nothing is timed")
        samples: dict[str, list[Sample]] = {variant.name: [] for variant in variants}
        for number in range(options.rounds):
            if options.seconds and number and time.monotonic() - began > options.seconds:
                break
            for variant in variants:
                sample = take_sample(transformer, variant, inputs, options.noise, warm=number == 0)
                samples[variant.name].append(sample)
        watched = {
            v.name: watch_forward(transformer, v, inputs, options.noise, tokens, lists) for v in variants
        }
    told = {
        "case": case.name,
        "model": case.model,
        "config": dict(case.config),
        "size": [case.frames, case.height, case.width],
        "grid": list(case.grid),
        "tokens": tokens,
        "text": case.text if case.valid is None else case.valid,
        "batch": case.batch,
        "layers": full,
        "layers_built": built,
        "scaled": built != full,
        "weights_bytes": sum(p.numel() * p.element_size() for p in transformer.parameters()),
        "rounds": len(samples["dense"]),
        "variants": {},
    }
    for variant in variants:
        told["variants"][variant.name] = describe_variant(
            variant, samples[variant.name], samples["dense"], watched, full, built, checks.get(variant.name)
        )
    return told


def describe_variant(
    variant: Variant,
    samples: list[Sample],
    dense: list[Sample],
    watched: dict[str, dict],
    full: dict[str, int],
    built: dict[str, int],
    checked: dict | None,
) -> dict[str, Any]:
    """The figures of a variant: seconds as measured and scaled, attention, memory, and what ran."""
    seen = watched[variant.name]
    factor = depth_factor(seen, full, built)
    seconds = [sample.seconds * factor for sample in samples]
    base = depth_factor(watched["dense"], full, built)
    ratios = [d.seconds * base / s for d, s in zip(dense, seconds, strict=True)]
    layers = seen["attention_ms"]
    told: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "seconds_each": seconds,
        "scaled_by": factor,
        "times_as_fast": statistics.median(ratios),
        "times_as_fast_each": ratios,
        "attention_ms_per_layer": statistics.median(layers) if layers else None,
        "attention_ms_each": layers,
        "predict_ms_per_layer": seen["predict_ms"] / len(layers) if layers else None,
        # of the forward as built: fewer layers leave it as it is, nearly
        "attention_share": sum(layers) / seen["forward_ms"] if layers else None,
        "peak_above_bytes": seen["peak_bytes"] or max(sample.peak_bytes for sample in samples),
    }
    if variant.options is None:
        return {**told, "kernels": seen["dense_kernels"]}
    report = samples[-1].report
    return {
        **told,
        "source": variant.source,
        "not_in_it": list(variant.dropped),
        "options": variant.options.to_mapping(),
        "check": checked,
        "keep": report.keep_achieved,
        "sparse_calls": report.sparse_calls,
        "dense_reasons": dict(report.dense_reasons),
        "executors": dict(report.executors),
        "token_orders": dict(report.token_orders),
        "bytes_held": report.bytes_held,
    }


def depth_factor(seen: dict[str, Any], full: dict[str, int], built: dict[str, int]) -> float:
    """How many times as long a forward takes with all layers: each kind of block by its own share of the time."""
    more = sum(seen["blocks_ms"][name] * (full[name] / built[name] - 1) for name in built)
    return 1 + more / seen["forward_ms"]


def check(
    case: FullSize,
    transformer: nn.Module,
    variant: Variant,
    device: torch.device,
    dtype: torch.dtype,
    noise: float,
) -> dict[str, Any]:
    """Whether a full plan in the variant's arrangement equals dense attention on a small grid.

    Returns:
        the relative errors of the full plan and of dense by another kernel, the limit, and `problem`, a sentence or
        None.
    """
    grid = tuple(min(n, most) for n, most in zip(case.grid, CHECK_GRID, strict=True))
    given = at_noise(case, make_inputs(case, grid, device, dtype), noise)
    with installed(transformer, variant.options) as processor:
        arrangement = processor.engine.layouts.arrangement
    full = SparseOptions(
        method="pooled",
        keep=1.0,
        order=arrangement.order,
        block=arrangement.block,
        tile=arrangement.tile,
        impl=variant.options.impl,
        min_tokens=0,
    )
    expected = transformer(**given)[0]
    with sdpa_kernel(SDPBackend.MATH):
        floor = relative_error(transformer(**given)[0], expected)
    with installed(transformer, full) as processor:
        error = relative_error(transformer(**given)[0], expected)
        report = processor.report
    return {"grid": list(grid), **judge_full_plan(error, floor, dtype, report)}


def print_case(told: dict[str, Any]) -> None:
    """One line of the case and one for each variant."""
    print(describe_case(told))
    head = f"  {'':26}{'forward ms':>16}{'spread':>17}{'ratio':>8}{'attention':>11}{'ms a layer':>12}"
    print(f"{head}{'of it plan':>12}{'peak GB':>9}{'keep':>8}")
    for name, one in told["variants"].items():
        low, high = min(one["seconds_each"]), max(one["seconds_each"])
        print(
            f"  {name:26}{_ms(one['seconds'] * 1e3):>16}{f'{_ms(low * 1e3)} - {_ms(high * 1e3)}':>17}"
            f"{one['times_as_fast']:7.2f}x{_percent(one['attention_share']):>11}{_ms(one['attention_ms_per_layer']):>12}"
            f"{_ms(one['predict_ms_per_layer']) if 'options' in one else '':>12}"
            f"{_gigabytes(one['peak_above_bytes']):>9}"
            f"{'' if one.get('keep') is None else format(one['keep'], '8.3f')}",
            flush=True,
        )


def describe_case(told: dict[str, Any]) -> str:
    """What was run."""
    frames, high, wide = told["size"]
    clip = f"{wide}x{high}" + (f", {frames} frames" if frames > 1 else "")
    depth = "+".join(str(n) for n in told["layers"].values())
    text = (
        f"{told['case']}: {told['model']}, {clip}, {told['tokens']:,} visual and {told['text']} text tokens"
    )
    text += f", batch {told['batch']}, {depth} layers"
    if told["scaled"]:
        text += f" (scaled from {'+'.join(str(n) for n in told['layers_built'].values())})"
    return text


def markdown_of(record: dict[str, Any]) -> str:
    """A table for each record: a row for each variant of each case."""
    where = record["environment"]
    head = ("case", "variant", "keep", "forward ms", "spread", "x as fast", "attention share", "attention ms a layer",
            "of it plan ms", "peak above weights GB", "executor")  # fmt: skip
    about = f"{where['chip']}, {record['dtype']}, random weights, noise level {record['noise']:g}, torch "
    about += f"{where['versions']['torch']}, {where['date'][:10]}."
    lines = [about, "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for told in record["cases"]:
        for name, one in told["variants"].items():
            sparse = "options" in one
            title = (
                f"{told['case']}, {told['tokens']:,} tokens{' *' if told['scaled'] else ''}"
                if not sparse
                else ""
            )
            low, high = min(one["seconds_each"]) * 1e3, max(one["seconds_each"]) * 1e3
            runs = ", ".join(one["executors"] if sparse else one["kernels"])
            cells = [
                title,
                name,
                "" if one.get("keep") is None else f"{one['keep']:.3f}",
                _ms(one["seconds"] * 1e3),
                f"{_ms(low)}–{_ms(high)}",
                f"{one['times_as_fast']:.2f}" if sparse else "",
                _percent(one["attention_share"]),
                _ms(one["attention_ms_per_layer"]),
                _ms(one["predict_ms_per_layer"]) if sparse else "",
                _gigabytes(one["peak_above_bytes"]),
                runs,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if any(told["scaled"] for told in record["cases"]):
        lines += [
            "",
            "\\* built with fewer layers and scaled to all of them; a preset's dense layers are not in it.",
        ]
    for one in record["failed"]:
        lines += ["", f"Not timed: {one['case']} {one.get('variant', '')}: {one['problem']}."]
    return "\n".join(lines)


def write_report(records: list[dict[str, Any]], docs: str | None) -> None:
    """Print the tables, or put them between their marks in a page.

    Raises:
        SystemExit: a page without the marks.
    """
    tables = "\n\n".join(map(markdown_of, records))
    if docs is None:
        print(tables)
        return
    put_between(Path(docs), "full size", tables)
    print(f"wrote {docs}")


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _gigabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


if __name__ == "__main__":
    sys.exit(main())
