"""Time denoising at full size with region-adaptive sampling, beside dense: random weights, so speed and never quality.

    python scripts/bench_region.py --cases flux-1024 flux-2048 wan-1.3b-480p --out region.json
    python scripts/bench_region.py --report region.json --docs docs/region.md
    python scripts/bench_region.py --tiny                      # the same code in a moment, on a CPU

A stock pipeline without text encoders and autoencoder denoises embeddings drawn by lot to latents. How many tokens a
step computes is known beforehand and which ones are of no matter to the time, so random weights serve. Told are the
transformer's own time in all forwards of a run, what whole and part forwards take, and the run's. The bound is what the
tokens alone would allow. Beside single tokens with dense attention stands the case's fast preset, alone and with whole
blocks chosen. Before anything is timed, a run that is asked for every token must equal dense to the bit.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _source_tree  # noqa: F401  (must come before dit_accel)
import diffusers
import torch
from _forward_times import reset_peak
from _full_size import CASES, FullSize, build_transformer, make_inputs
from _pages import put_between, write_text
from _quality_record import describe_environment
from torch import Tensor, nn

from dit_accel import accelerate
from dit_accel.bench.stopwatch import Stopwatch, seconds_of
from dit_accel.options import SparseOptions
from dit_accel.preset import load_preset
from dit_accel.region.options import Region
from dit_accel.region.steps import count_active, whole_steps

PIPELINES = {
    "FluxTransformer2DModel": "FluxPipeline",
    "WanTransformer3DModel": "WanPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
}
STEPS = {"FluxPipeline": 28, "WanPipeline": 30, "StableDiffusion3Pipeline": 28}
KINDS = ("whole", "part")


@dataclass(frozen=True)
class Variant:
    """Of a run: region sampling, sparse attention, both or neither."""

    region: Region | None = None
    sparse: SparseOptions | None = None




def main() -> None:
    options = read_options()
    if options.report:
        text = "\n\n".join(markdown_of(json.loads(Path(path).read_text())) for path in options.report)
        if options.docs:
            put_between(Path(options.docs), "region", text)
        else:
            print(text)
        return
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record = {
        "environment": {**describe_environment(device), "command": " ".join(["python", *sys.argv])},
        "weights": "random",
        "dtype": str(dtype).removeprefix("torch."),
        "tiny": options.tiny,
        "cases": [],
    }
    for name in options.cases:
        case = CASES[name].made_tiny() if options.tiny else CASES[name]
        record["cases"].append(time_case(case, device, dtype, options))
        if options.out:  # after every case: a run that is cut short leaves what it has
            write_text(Path(options.out), json.dumps(record, indent=1) + "\n")
    print(markdown_of(record))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fit = [name for name, case in CASES.items() if case.transformer in PIPELINES and not case.shallow]
    fit.remove("flux-4096")  # it would take half an hour
    parser.add_argument(
        "--cases", nargs="+", choices=fit, default=fit, metavar="CASE", help=f"some of {', '.join(fit)}; default: all"
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25], help="shares of the tokens (0.5 0.25)")
    parser.add_argument("--steps", type=int, help="of a run (28, Wan 30)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant, in turns (2)")
    parser.add_argument("--tiny", action="store_true", help="small models and grids, on a CPU: tries the script")
    parser.add_argument("--out", help="write the JSON record here")
    parser.add_argument("--report", nargs="+", metavar="RECORD", help="make the table of records")
    parser.add_argument("--docs", help="where --report puts it, between its marks; default: the terminal")
    options = parser.parse_args()
    if options.rounds < 1 or (options.steps is not None and options.steps < 4):
        parser.error("--rounds is at least 1, --steps at least 4")
    return options


def time_case(case: FullSize, device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Everything there is to tell of a case.

    Raises:
        SystemExit: region sampling of every token is not dense.
    """
    transformer = build_transformer(case, device, dtype, whole=True)
    pipe, given = make_pipeline(case, transformer, device, dtype)
    steps = options.steps or STEPS[type(pipe).__name__]
    given["num_inference_steps"] = steps
    check(case, pipe, given)
    tokens = math.prod(case.grid)
    told: dict[str, Any] = {
        "case": case.name,
        "model": case.model,
        "tokens": tokens,
        "batch": case.batch,
        "steps": steps,
        "variants": {},
    }
    variants = variants_of(case, options)
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    for number in range(options.rounds):
        for name, variant in variants.items():
            if number == 0:  # warms up
                denoise(pipe, {**given, "num_inference_steps": 6}, variant)
            runs[name].append(denoise(pipe, given, variant))
    dense = statistics.median(run["transformer"] for run in runs["dense"])
    for name, variant in variants.items():
        region, sparse = variant.region, variant.sparse
        spent = [run["transformer"] for run in runs[name]]
        told["variants"][name] = {
            "transformer_seconds": statistics.median(spent),
            "transformer_seconds_each": spent,
            "run_seconds": statistics.median(run["run"] for run in runs[name]),
            "times_as_fast": dense / statistics.median(spent),
            "bound": None if sparse is not None else bound_of(region, steps, tokens),
            "whole_ms": _middle(runs[name], "whole"),
            "part_ms": _middle(runs[name], "part"),
            "whole_forwards": len(runs[name][0]["whole"]),
            "part_forwards": len(runs[name][0]["part"]),
            "peak_bytes": runs[name][-1]["peak"],
            "options": None if region is None else region.to_mapping(),
            "sparse": None if sparse is None else sparse.to_mapping(),
            "sparse_calls": runs[name][0]["sparse_calls"],
            "dense_reasons": runs[name][0]["dense_reasons"],
        }
    return told


def variants_of(case: FullSize, options: argparse.Namespace) -> dict[str, Variant]:
    """Dense; single tokens at each ratio; the case's fast preset, alone and with blocks at each ratio."""
    name = case.presets[0]
    small = {"block": 16, "dense_layers": ()} if options.tiny else {}
    sparse = load_preset(name).sparse.merged({"min_tokens": 0, **small})
    found = {"dense": Variant()}
    found |= {f"region {ratio:g}": Variant(Region(sample_ratio=ratio)) for ratio in options.ratios}
    found[name] = Variant(sparse=sparse)
    for ratio in options.ratios:
        found[f"{name}, region {ratio:g} by blocks"] = Variant(Region(sample_ratio=ratio, unit="block"), sparse)
    return found


def make_pipeline(
    case: FullSize, transformer: nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """A stock pipeline of nothing but transformer and scheduler, and the arguments of a run to latents."""
    cls = getattr(diffusers, PIPELINES[case.transformer])
    made = make_inputs(case, case.grid, device, dtype)
    if cls.__name__ == "WanPipeline":
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        parts = ("tokenizer", "text_encoder", "vae")
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    if cls.__name__ == "StableDiffusion3Pipeline":
        parts += ("text_encoder_3", "tokenizer_3")
    pipe = cls(transformer=transformer, scheduler=scheduler, **dict.fromkeys(parts))
    pipe.set_progress_bar_config(disable=True)
    words: Tensor = made["encoder_hidden_states"][:1]
    given: dict[str, Any] = {
        "prompt_embeds": words,
        "height": case.height,
        "width": case.width,
        "guidance_scale": 1.0 if cls.__name__ == "WanPipeline" else 3.5,
        "output_type": "latent",
        "return_dict": False,
    }
    if "pooled_projections" in made:
        given["pooled_prompt_embeds"] = made["pooled_projections"][:1]
    if cls.__name__ == "WanPipeline":
        given["num_frames"] = case.frames
    if cls.__name__ == "StableDiffusion3Pipeline":
        given["negative_prompt_embeds"] = made["encoder_hidden_states"][1:]
        given["negative_pooled_prompt_embeds"] = made["pooled_projections"][1:]
    return pipe, given


def denoise(pipe: Any, given: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """One run: its seconds and its transformer's, milliseconds of whole and of part forwards, memory, and the latents.

    Raises:
        SystemExit: another number of part forwards than the plan of steps says.
    """
    device = next(pipe.transformer.parameters()).device
    region, handle = variant.region, None
    if region is not None or variant.sparse is not None:
        handle = accelerate(pipe, variant.sparse, region=False if region is None else region)
    watch, started = Stopwatch(device), []
    # in front of the package's own hooks and behind them
    hooks = [
        pipe.transformer.register_forward_pre_hook(lambda *_: started.append(watch.now()), prepend=True),
        pipe.transformer.register_forward_hook(lambda *_: watch.note("forward", started.pop())),
    ]
    held = reset_peak(device)
    result: list[Tensor] = []
    generator = torch.Generator(device).manual_seed(0)
    try:
        seconds = seconds_of(lambda: result.append(pipe(**given, generator=generator)[0]), device)
        report = None if handle is None else handle.report()
    finally:
        for hook in hooks:
            hook.remove()
        if handle is not None:
            handle.remove()
    spent = watch.read()["forward"]
    steps = given["num_inference_steps"]
    whole = range(steps) if region is None else whole_steps(region, steps)
    by_kind = {kind: [ms for n, ms in enumerate(spent) if (n in whole) == (kind == "whole")] for kind in KINDS}
    planned = sorted(map(len, by_kind.values()))
    if region is not None and region.sample_ratio < 1 and sorted(report.regions.values()) != planned:
        told = f"forwards were {report.regions}, and {steps} steps were to have {len(whole)} whole ones"
        raise SystemExit(f"{region}: {told}")
    peak = None if held is None else torch.cuda.max_memory_allocated(device) - held
    return {
        "run": seconds,
        "transformer": sum(spent) / 1e3,
        **by_kind,
        "peak": peak,
        "latents": result[0],
        "sparse_calls": 0 if report is None else report.sparse_calls,
        "dense_reasons": {} if report is None else dict(report.dense_reasons),
    }


def check(case: FullSize, pipe: Any, given: dict[str, Any]) -> None:
    """Raises SystemExit unless a run that asks for every token equals dense to the bit; four steps."""
    short = {**given, "num_inference_steps": 4}
    every = Variant(Region(sample_ratio=1.0))
    dense, asked = (denoise(pipe, short, one)["latents"] for one in (Variant(), every))
    if not torch.equal(dense, asked) or not dense.isfinite().all():
        raise SystemExit(f"{case.name}: with every token computed the latents are not dense's; nothing is timed")


def bound_of(region: Region | None, steps: int, tokens: int) -> float | None:
    """How many times as fast it could be if time went with tokens."""
    if region is None:
        return None
    whole = len(whole_steps(region, steps))
    return steps / (whole + (steps - whole) * count_active(region, tokens) / tokens)


def markdown_of(record: dict[str, Any]) -> str:
    """A table: a row for each variant of each case."""
    where = record["environment"]
    made = f"torch {where['versions']['torch']}, {where['date'][:10]}"
    head = ("case", "variant", "transformer s", "spread", "x as fast", "at most", "whole forward ms", "part forward ms",
            "whole and part forwards", "whole run s", "peak above weights GB")  # fmt: skip
    lines = [
        f"{where['chip']}, {record['dtype']}, random weights, {made}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for told in record["cases"]:
        for name, one in told["variants"].items():
            each = one["transformer_seconds_each"]
            cells = [
                f"{told['case']}, {told['tokens']:,} tokens, {told['steps']} steps" if name == "dense" else "",
                name,
                f"{one['transformer_seconds']:.3f}",
                f"{min(each):.3f}–{max(each):.3f}",
                "" if name == "dense" else f"{one['times_as_fast']:.2f}",
                "" if one["bound"] is None else f"{one['bound']:.2f}",
                *("" if one[f"{kind}_ms"] is None else f"{one[f'{kind}_ms']:.1f}" for kind in KINDS),
                f"{one['whole_forwards']} + {one['part_forwards']}" if one["options"] else "",
                f"{one['run_seconds']:.3f}",
                "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e9:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _middle(runs: list[dict], kind: str) -> float | None:
    every = [ms for run in runs for ms in run[kind]]
    return statistics.median(every) if every else None


if __name__ == "__main__":
    main()
