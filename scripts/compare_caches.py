"""Our step caches beside cache-dit's, diffusers' own and fewer steps on one small Wan; and where state goes wrong.

    python scripts/compare_caches.py --size 64 --frames 9 --prompts 2 --out record.json --docs docs/caches.md
    python scripts/compare_caches.py --report record.json --docs docs/caches.md

Every run starts from the same noise and is compared with the dense one: share of forwards that ran (counted in the last
block, so that first blocks that always run do not count), share of self-attentions, PSNR of decoded frames, seconds.
Beside each cache stands what a run with fewer steps gives at the same share of forwards, interpolated between the runs
on either side. MagCache's ratios, ours and diffusers', are measured on a prompt that is not compared.

What is not installed or fails stands in the record and the tables with its error. cache-dit is `pip install cache-dit`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import _source_tree  # noqa: F401  (must come before dit_accel)
import numpy as np
import torch
from _cache_cases import CASES, Bench, apart
from _cache_rivals import Rival, Setting, make_case_rivals, make_rivals, package_versions
from _pages import put_between, write_text
from _quality_record import describe_environment
from bench_caches import at_cost

import dit_accel
from dit_accel.caches.mag import ratios_of
from dit_accel.pipelines import recipe
from dit_accel.pipelines.loading import pick_device
from dit_accel.preset import load_preset
from dit_accel.quality.compare import compare_clips
from dit_accel.quality.prompt_accuracy import Prompt, held_out_prompts

WARMUP, THRESHOLDS = 4, (0.08, 0.12, 0.2)  # of the first-block caches
FEWER = (0.85, 0.7, 0.6, 0.5, 0.4, 0.3)  # shares of the steps


def main() -> None:
    options = read_options()
    if options.report:
        record = json.loads(Path(options.report).read_text())
    else:
        record = compare(options)
        write_text(Path(options.out), json.dumps(record, indent=1) + "\n")
    print(markdown_of(record))
    if options.docs:
        write_tables(record, Path(options.docs))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-wan", help="folder of a Wan model, or a shipped one's name (tiny-wan)")
    parser.add_argument("--preset", default="tiny-wan", help="how it samples (tiny-wan)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (64)")
    parser.add_argument("--frames", type=int, default=9, help="of each clip (9)")
    parser.add_argument("--steps", type=int, default=20, help="of the dense run (20)")
    parser.add_argument("--prompts", type=int, default=2, help="held-out prompts (2)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and noise (1)")
    parser.add_argument("--case-size", type=int, default=32, help="side in pixels in the cases (32)")
    parser.add_argument("--case-frames", type=int, default=1, help="frames in the cases (1)")
    parser.add_argument("--case-steps", type=int, default=12, help="steps in the cases, from 10 on (12)")
    parser.add_argument("--only", nargs="+", metavar="PACKAGE", help="dit_accel, diffusers, cache-dit (all)")
    parser.add_argument("--threads", type=int, help="of torch on a CPU (its own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", help="file of the record")
    parser.add_argument("--docs", help="page whose table between the marks is replaced")
    parser.add_argument("--report", metavar="RECORD", help="print the tables of a record instead of running")
    options = parser.parse_args()
    if not options.report and not options.out:
        parser.error("--out FILE is needed (or --report RECORD)")
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    device, generate = pick_device(options.device), load_preset(options.preset).generate
    drive = recipe("wan")
    stock = drive.load(options.model, device=str(device), dtype=options.dtype, flow_shift=generate.flow_shift)
    drive.size_rule_of(stock).check(options.size, options.size, options.frames)

    def make() -> Any:
        """A stock pipeline with a transformer and a scheduler of its own."""
        own = {"transformer": copy.deepcopy(stock.transformer), "scheduler": copy.deepcopy(stock.scheduler)}
        pipe = type(stock)(**{**stock.components, **own})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    common = {"negative_prompt": generate.negative_prompt}
    call = {
        **common, "guidance_scale": generate.guidance, "height": options.size, "width": options.size,
        "num_frames": options.frames,
    }  # fmt: skip
    prompts = held_out_prompts(options.prompts, options.seed)
    record: dict[str, Any] = {
        "environment": describe_environment(device),
        "packages": package_versions(),
        "model": Path(options.model).name,
        "preset": options.preset,
        "size": options.size,
        "frames": options.frames,
        "steps": options.steps,
        "prompts": [prompt.text for prompt in prompts],
        "seed": options.seed,
        "dtype": str(stock.transformer.dtype),
        "runs": [],
        "cases": {"size": options.case_size, "frames": options.case_frames, "steps": options.case_steps, "rows": []},
    }
    began = time.perf_counter()
    small = {"height": options.case_size, "width": options.case_size, "num_frames": options.case_frames}
    small["max_sequence_length"] = 64
    ratios = measure_ratios(make(), call, options.steps, options.seed)
    run_clip(make(), prompts[0], call, 2)  # allocations outside the timing
    dense = [run_clip(make(), prompt, call, options.steps) for prompt in prompts]
    record["runs"].append(row_of("dense", "", dense, dense, options.steps))
    for steps in sorted({round(share * options.steps) for share in FEWER} - {0, options.steps}, reverse=True):
        fewer = [run_clip(make(), prompt, call, steps) for prompt in prompts]
        record["runs"].append({**row_of(f"{steps} steps", "fewer steps", fewer, dense, options.steps), "steps": steps})
    for rival in make_rivals(WARMUP, THRESHOLDS):
        if options.only and rival.package not in options.only:
            continue
        print(f"{time.perf_counter() - began:6.1f} s  {rival.package}: {rival.name}", flush=True)
        record["runs"].append(compare_rival(rival, make, prompts, call, dense, Setting(options.steps, ratios)))
    texts = tuple(prompt.text for prompt in held_out_prompts(2, options.seed))
    for rival in make_case_rivals():
        if options.only and rival.package not in options.only:
            continue
        print(f"{time.perf_counter() - began:6.1f} s  cases, {rival.package}: {rival.name}", flush=True)
        setting = Setting(options.case_steps, ratios)
        bench = Bench(make, rival, setting, {**common, **small}, texts, generate.guidance)
        record["cases"]["rows"].append(try_cases(bench))
    record["seconds"] = round(time.perf_counter() - began, 1)
    return record


def measure_ratios(pipe: Any, call: dict[str, Any], steps: int, seed: int) -> tuple[float, ...]:
    prompt = held_out_prompts(1, seed + 1000)[0]
    handle = dit_accel.accelerate(pipe, cache={"name": "mag", "dry_run": True, "min_steps": 0})
    run_clip(pipe, prompt, call, steps)
    return ratios_of(handle.trials())


def run_clip(pipe: Any, prompt: Prompt, call: dict[str, Any], steps: int) -> dict[str, Any]:
    """One clip: uint8 frames, seconds, and how often which parts of the transformer ran."""
    blocks = pipe.transformer.blocks
    ran = {"last": 0, "blocks": 0, "attentions": 0}

    def count(*names: str) -> Callable:
        def add(*_: Any) -> None:
            for name in names:
                ran[name] += 1

        return add

    for i, block in enumerate(blocks):
        # inside of what any of the caches leaves out
        block.ffn.net[-1].register_forward_hook(count("blocks", *(["last"] if i == len(blocks) - 1 else [])))
        block.attn1.to_v.register_forward_hook(count("attentions"))
    began, busy = time.perf_counter(), time.process_time()
    (video,) = pipe(
        prompt=prompt.text, generator=torch.Generator("cpu").manual_seed(prompt.seed), output_type="np",
        num_inference_steps=steps, return_dict=False, **call,
    )  # fmt: skip
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    if not np.isfinite(video).all():
        raise FloatingPointError("frames that are not finite")
    clip = np.rint(np.asarray(video)[0] * 255).astype(np.uint8)
    return {"clip": clip, "seconds": seconds, "busy": busy, "layers": len(blocks), **ran}


def row_of(name: str, package: str, runs: list[dict], dense: list[dict], steps: int) -> dict[str, Any]:
    """Figures of one variant over all prompts; two forwards make a step."""
    forwards, layers = 2 * steps * len(runs), runs[0]["layers"]
    compared = [compare_clips(base["clip"], run["clip"]).psnr for base, run in zip(dense, runs, strict=True)]
    return {
        "name": name,
        "package": package,
        "forwards": sum(run["last"] for run in runs) / forwards,
        "blocks": sum(run["blocks"] for run in runs) / forwards / layers,
        "attentions": sum(run["attentions"] for run in runs) / forwards / layers,
        "seconds": mean(run["seconds"] for run in runs),
        "busy": mean(run["busy"] for run in runs),
        "psnr": [value if math.isfinite(value) else None for value in compared],  # None: equal
    }


def compare_rival(
    rival: Rival, make: Callable[[], Any], prompts: list[Prompt], call: dict, dense: list[dict], setting: Setting
) -> dict[str, Any]:
    try:
        runs = []
        for prompt in prompts:
            with rival.on(make(), setting) as pipe:
                runs.append(run_clip(pipe, prompt, call, setting.steps))
    except Exception as error:  # a rival's failure is a line of the record
        return {"name": rival.name, "package": rival.package, "error": told(error)}
    row = row_of(rival.name, rival.package, runs, dense, setting.steps)
    return {**row, "pair": rival.pair}


def try_cases(bench: Bench) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    try:
        first = bench.alone()
        bench.known.clear()
        twice = apart(first, bench.alone())
    except Exception as error:
        return {"name": bench.rival.name, "package": bench.rival.package, "error": told(error)}
    rows["two fresh runs"] = twice
    for name, case in CASES.items():
        try:
            rows[name] = case(bench)
        except Exception as error:  # so is an error in a run that goes well alone
            rows[name] = told(error)
    return {"name": bench.rival.name, "package": bench.rival.package, "ran": bench.ran, "apart": rows}


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def markdown_of(record: dict[str, Any]) -> str:
    """What was compared, on what, and the tables."""
    environment = record["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in record["packages"].items() if v and k != "dit_accel")
    lines = [
        f"{record['model']}, {record['frames']} frames of {record['size']}x{record['size']}, {record['steps']} steps, "
        f"{len(record['prompts'])} prompts, {environment['chip']}, torch {environment['versions']['torch']}, "
        f"{packages}; {environment['date'][:10]}, commit {environment['commit']}. "
        f"The first-block caches compute {WARMUP} steps first; diffusers' has no such option.",
        "",
        "| package | cache | forwards run | PSNR dB (worst) | fewer steps at that cost | seconds (of a processor) |",
        "|" + " --- |" * 6,
    ]
    return "\n".join([*lines, *quality_rows(record), "", *verdicts(record), "", *case_rows(record)])


def quality_rows(record: dict[str, Any]) -> list[str]:
    fewer, lines = fewer_of(record), []
    for row in record["runs"]:
        if "error" in row:
            lines.append(f"| {row['package']} | {row['name']} | fails: {_cell(row['error'])} | | | |")
            continue
        run = f"{row['forwards']:.1%}"
        if abs(row["attentions"] - row["blocks"]) > 1e-9:
            run += f" (self-attentions {row['attentions']:.1%})"
        rival = at_cost(fewer, row["forwards"]) if row["package"] not in ("", "fewer steps") else None
        against = "" if rival is None else f"{rival:.2f} ({psnr_of(row) - rival:+.2f})"
        lines.append(
            f"| {row['package']} | {row['name']} | {run} | {_psnr_cell(row)} | {against} | "
            f"{row['seconds']:.2f} ({row['busy']:.2f}) |"
        )
    return lines


def verdicts(record: dict[str, Any]) -> list[str]:
    """The first-block caches pair by pair, and the best cache at half the forwards."""
    rows = [row for row in record["runs"] if "error" not in row]
    lines = []
    paired = {
        package: {row["pair"]: row for row in rows if row["package"] == package and row.get("pair")}
        for package in ("dit_accel", "cache-dit")
    }
    for pair, ours in paired["dit_accel"].items():
        theirs = paired["cache-dit"].get(pair)
        if theirs is not None:
            lines.append(
                f"- {pair}: dit_accel {psnr_of(ours):.2f} dB with {ours['forwards']:.1%} of the forwards, cache-dit "
                f"{psnr_of(theirs):.2f} dB with {theirs['forwards']:.1%}."
            )
    fewer = fewer_of(record)
    half = [row for row in rows if row["package"] == "dit_accel" and row["forwards"] <= 0.5]
    if half:
        best = max(half, key=psnr_of)
        rival = at_cost(fewer, best["forwards"])
        gain = "" if rival is None else f", {psnr_of(best) - rival:+.2f} dB against fewer steps at that cost"
        lines.append(
            f"- At half the forwards or fewer: {best['name']}, {psnr_of(best):.2f} dB with "
            f"{best['forwards']:.1%}{gain}."
        )
    return lines


def case_rows(record: dict[str, Any]) -> list[str]:
    cases = record["cases"]
    names = list(CASES)
    lines = [
        f"Largest difference between a run and the same run of a fresh pipeline with the same cache "
        f"({cases['frames']} frames of {cases['size']}x{cases['size']}, {cases['steps']} steps); 0 is as it should be.",
        "",
        f"| package | cache | forwards run | {' | '.join(names)} |",
        "|" + " --- |" * (len(names) + 3),
    ]
    for row in cases["rows"]:
        head = f"| {row['package']} | {row['name']} |"
        if "error" in row:
            lines.append(f"{head} | fails: {_cell(row['error'])} |" + " |" * (len(names) - 1))
            continue
        lines.append(f"{head} {row['ran']:.0%} | {' | '.join(_apart_cell(row['apart'][name]) for name in names)} |")
    return lines


def fewer_of(record: dict[str, Any]) -> list[tuple[float, float]]:
    """(share of forwards, PSNR) of the runs with fewer steps, rising."""
    return sorted((row["forwards"], psnr_of(row)) for row in record["runs"] if row["package"] == "fewer steps")


def psnr_of(row: dict[str, Any]) -> float:
    values = [value for value in row["psnr"] if value is not None]
    return mean(values) if values else math.inf


def _psnr_cell(row: dict[str, Any]) -> str:
    values = [value for value in row["psnr"] if value is not None]
    return f"{mean(values):.2f} ({min(values):.2f})" if values else "equal"


def _apart_cell(value: float | str) -> str:
    if isinstance(value, str):
        return f"**{_cell(value)}**"
    return "0" if value == 0 else f"**{value:.2g}**"


def _cell(text: str) -> str:
    return text.replace("|", "/")


def write_tables(record: dict[str, Any], page: Path) -> None:
    """Replace what stands between the marks.

    Raises:
        SystemExit: a page without the marks.
    """
    put_between(page, "comparison", markdown_of(record))


if __name__ == "__main__":
    main()
