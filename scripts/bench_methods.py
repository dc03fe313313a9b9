"""Compare the sparse methods at equal achieved keep: distance from dense, prompt accuracy, recall and time.

    python scripts/bench_methods.py --model presets/models/tiny-wan --out b
    python scripts/bench_methods.py --model DIR --grid large --prompts 8 --batch 1 --shard 0/4 --device cuda:0 --out b
    python scripts/bench_methods.py --merge b/record-*of4.json --out b
    python scripts/bench_methods.py --model DIR --beside b/record.json --out more     # what is left of it
    python scripts/bench_methods.py --report b/record.json

For every method and keep it first searches the options that keep that much (`_method_table.py`); a share that a method
cannot keep is named and left out. Every variant starts a prompt from the same noise. Beside a method that looks at the
tokens, where it keeps a quarter or less, and beside `pooled` stands a control that draws as many blocks by lot, in the
same token order, with the same forced blocks and dense steps. Other controls: fewer steps of dense attention, and dense
attention by another kernel (the noise floor). Each variant's figures are
written as soon as it is done. A shard is a part of the variants, not of the prompts.

Denoising time is that of whole runs that nobody watches; what prediction, reordering and attention take of it is
measured in a run of its own, and so is recall.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _source_tree  # noqa: F401  (must come before dit_accel)
from _method_report import LOW_KEEP, print_table, write_report
from _method_runs import Bench, measure, run_random, run_sparse, watch_run
from _method_table import METHODS, Entry, Fit, Options, chosen_methods, fit
from _quality_record import describe_environment
from _run_arguments import add_run_arguments, choose_size
from evaluate_quality import Variant, open_judges, parse_value, parse_variant

from dit_accel.options import SparseOptions
from dit_accel.preset import Preset, load_preset
from dit_accel.quality.prompt_accuracy import held_out_prompts

KEEPS = (0.5, 0.35, 0.25, 0.15, 0.10, 0.05)
STEP_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the steps, for the control with fewer of them
_SCORE_BYTES = 8 * 2**30  # what the math kernel may hold; it writes all scores down
# Facts that shards of one comparison must share.
_SHARED = ("model", "preset", "grid", "size", "frames", "tokens", "steps", "guidance", "flow_shift", "dtype", "seed",
           "prompts", "batch", "set")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A method at a wanted keep with its control, or a control of dense attention (`method` None)."""

    method: str | None
    wanted: float | None = None
    dense: str | None = None  # as evaluate_quality.py writes variants

    @property
    def name(self) -> str:
        """Its variant's, in a record."""
        return f"dense,{self.dense}" if self.method is None else f"{self.method}@{self.wanted:g}"


def main() -> None:
    began = time.monotonic()
    options = read_options()
    if options.report:
        write_report(
            [json.loads(Path(path).read_text()) for path in options.report],
            Path(options.docs),
            Path(options.picture),
        )
        return
    if not options.out:
        raise SystemExit("--out DIR is needed")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        record = merge([json.loads(Path(path).read_text()) for path in options.merge])
        write_record(out / "record.json", record)
    else:
        if not options.model:
            raise SystemExit("--model DIR is needed (or --merge RECORDS, or --report RECORDS)")
        shard, shards = (int(n) for n in options.shard.split("/"))
        if not 0 <= shard < shards:
            raise SystemExit(f"--shard {options.shard}: write i/n with 0 <= i < n")
        name = "record.json" if shards == 1 else f"record-{shard}of{shards}.json"
        record = compare(options, (shard, shards), out / name, began)
    print_table(record)
    if record["failed"]:
        raise SystemExit(f"{len(record['failed'])} jobs failed")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--preset", default="tiny-wan-fast", help="sampling, and which steps and layers are dense"
    )
    parser.add_argument("--methods", nargs="+", help="instead of every method there is; all: variations too")
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts (64)")
    parser.add_argument(
        "--fit-steps", type=int, default=6, help="steps of the runs that search for options (6)"
    )
    parser.add_argument("--rows", type=int, default=64, help="query tokens on which recall is measured (64)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a sparse option of every method"
    )
    parser.add_argument("--shard", default="0/1", help="i/n: the i-th of n parts of the variants")
    parser.add_argument("--seconds", type=float, help="begin no variant that would end later than this")
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="RECORD",
        help="run nothing that these records hold already",
    )
    parser.add_argument("--out", help="folder for the record")
    parser.add_argument("--report", nargs="+", metavar="RECORD", help="write table and picture of records")
    docs = Path(__file__).resolve().parent.parent / "docs"
    parser.add_argument("--docs", default=str(docs / "methods.md"), help="where --report writes its table")
    parser.add_argument("--picture", default=str(docs / "pictures" / "methods.png"))
    return parser.parse_args()


def compare(options: argparse.Namespace, shard: tuple[int, int], path: Path, began: float) -> dict:
    """Run every variant of a shard and write the record after each."""
    import torch

    from dit_accel.pipelines import wan

    preset = load_preset(options.preset)
    if preset.sparse is None:
        raise SystemExit(f"preset {preset.name} is dense; give --preset one with sparse options")
    device = wan.pick_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    pipe = wan.load(
        options.model, device=str(device), dtype=options.dtype, flow_shift=preset.generate.flow_shift
    )
    side, frames = choose_size(options, preset.generate)
    wan.size_rule_of(pipe).check(side, side, frames)
    grid = grid_of(pipe, side, frames)
    steps = options.steps or preset.generate.steps
    chosen = dict(item.split("=", 1) for item in options.set)
    record = {
        "environment": {
            **describe_environment(device),
            "command": " ".join(["python", "scripts/bench_methods.py", *sys.argv[1:]]),
        },
        "model": Path(options.model).name,
        "preset": preset.name,
        "grid": list(grid),
        "size": side,
        "frames": frames,
        "tokens": math.prod(grid),
        "steps": steps,
        "guidance": preset.generate.guidance,
        "flow_shift": preset.generate.flow_shift,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.transformer.dtype),
        "seed": options.seed,
        "prompts": options.prompts,
        "batch": options.batch,
        "keeps": options.keeps,
        "set": {key: parse_value(value) for key, value in chosen.items()},
        "shard": list(shard),
        "left": [],  # jobs for which there was no time
        "failed": [],  # jobs that ended with an error
        "unreached": [],  # keeps that a method cannot have
        "variants": {},
    }
    call = {
        "negative_prompt": preset.generate.negative_prompt,
        "guidance_scale": preset.generate.guidance,
        "height": side,
        "width": side,
        "num_frames": frames,
    }
    with open_judges(options.judges) as judges:
        bench = Bench(
            pipe=pipe,
            call=call,
            grid=grid,
            steps=steps,
            prompts=held_out_prompts(options.prompts, options.seed),
            batch=options.batch,
            base={**dense_part(preset), **record["set"]},
            fit_steps=min(options.fit_steps, steps),
            rows=options.rows,
            judges=judges,
        )
        beside = [json.loads(Path(path).read_text()) for path in options.beside]
        done = done_in(beside, record)
        jobs = jobs_of(chosen_methods(options.methods), options.keeps, preset, bench, record["tokens"])
        jobs = [job for job in jobs if job.name not in done]
        mine = share_out(jobs, shard[1])[shard[0]]
        longest = 0.0
        note(record, path, *run_dense(bench))
        for number, job in enumerate(mine):
            started = time.monotonic()
            if options.seconds and started - began + longest > options.seconds:
                record["left"] = [vars(job) for job in mine[number:]]
                print(f"out of time: {len(record['left'])} of {len(mine)} jobs are left")
                break
            too_much = least_kept([*beside, record], job)
            if too_much is not None:
                record["unreached"].append(too_much)
                continue
            try:
                for name, told in run_job(bench, job, preset, record, done):
                    note(record, path, name, told)
            except RuntimeError as problem:  # of one job: the others are still worth their time
                record["failed"].append({**vars(job), "problem": f"{type(problem).__name__}: {problem}"})
                print(f"FAILED {job}: {problem}", flush=True)
            longest = max(longest, time.monotonic() - started)
    write_record(path, record)
    return record


def grid_of(pipe: Any, side: int, frames: int) -> tuple[int, int, int]:
    """Frames, rows and columns of a clip, in tokens."""
    deep, high, wide = pipe.transformer.config.patch_size
    latent = side // pipe.vae_scale_factor_spatial
    return ((frames - 1) // pipe.vae_scale_factor_temporal + 1) // deep, latent // high, latent // wide


def dense_part(preset: Preset) -> Options:
    """What stays dense, the same for every method; and no lower bound of tokens."""
    sparse = preset.sparse
    shared = ("dense_above", "dense_below", "dense_first", "dense_layers")
    return {name: getattr(sparse, name) for name in shared} | {"min_tokens": 0}


def jobs_of(methods: list[str], keeps: list[float], preset: Preset, bench: Bench, tokens: int) -> list[Job]:
    """Everything to run but plain dense attention. Methods of one keep follow one another: they share controls."""
    jobs = [Job(None, dense=f"kernel={kernel}") for kernel in noise_floor(bench, tokens)]
    fewer = {round(bench.steps * share) for share in STEP_SHARES} - {0, bench.steps}
    jobs += [Job(None, dense=f"steps={n}") for n in sorted(fewer, reverse=True)]
    return jobs + [
        Job(method, keep) for keep in keeps for method in methods if _is_for(METHODS[method], keep)
    ]


def _is_for(entry: Entry, keep: float) -> bool:
    return entry.keeps is None or keep in entry.keeps


def share_out(jobs: list[Job], shards: int) -> list[list[Job]]:
    """About as much work for each shard. Entries of one method at one keep stay together: they share a control."""
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        entry = METHODS.get(job.method)
        groups.setdefault((job.wanted, job.dense, entry and (entry.of or job.method)), []).append(job)

    def effort(group: list[Job]) -> float:
        """In variants: each, their control, and the search where every trial is a whole run."""
        entry = METHODS.get(group[0].method)
        return len(group) + (0.0 if entry is None else 0.8 + entry.whole_run)

    parts: list[list[Job]] = [[] for _ in range(shards)]
    load = [0.0] * shards
    for group in sorted(groups.values(), key=effort, reverse=True):
        least = load.index(min(load))
        parts[least] += group
        load[least] += effort(group)
    return [sorted(part, key=jobs.index) for part in parts]


def noise_floor(bench: Bench, tokens: int) -> list[str]:
    """Another kernel of dense attention than torch chooses: the math kernel, where its table of scores fits."""
    heads = bench.pipe.transformer.config.num_attention_heads
    if 4 * heads * tokens**2 * min(bench.batch, len(bench.prompts)) <= _SCORE_BYTES:
        return ["math"]
    return ["flash"] if bench.pipe.device.type == "cuda" else []


def run_dense(bench: Bench) -> tuple[str, dict]:
    """Dense attention, which everything else is compared with."""
    told = measure(bench, Variant("dense", None, bench.steps, None))
    return "dense", {"kind": "dense", **told}


def run_job(
    bench: Bench, job: Job, preset: Preset, record: dict, done: set[str]
) -> Iterator[tuple[str, dict]]:
    """The variants of a job that are not done: name and figures of each."""
    name = job.name
    if job.method is None:
        told = measure(bench, parse_variant(name, preset, bench.steps))
        kind = "noise floor" if job.dense.startswith("kernel") else "fewer steps"
        yield name, {"kind": kind, "setting": job.dense, **told}
        return
    entry = METHODS[job.method]
    method = entry.of or job.method
    found = search(bench, method, entry, job.wanted)
    if not found.reached:
        record["unreached"].append({"method": job.method, "wanted": job.wanted, "nearest": found.keep})
        print(f"{job.method} cannot keep {job.wanted:g}: the nearest it can is {found.keep:.3f}")
        return
    told = run_sparse(bench, name, bench.sparse(method, found.options), entry.whole_run)
    twin_name, twin = None, {}
    if (entry.adaptive and job.wanted <= LOW_KEEP) or job.method == "pooled":
        twin_name, twin = control_of(bench, method, found.options, told["figures"]["achieved_keep"])
    facts = {"kind": "method", "method": job.method, "adaptive": entry.adaptive, "wanted": job.wanted}
    fitted = {"set": found.options, "fitted_keep": round(found.keep, 5), "control": twin_name}
    yield name, {**facts, **fitted, **told}
    if twin_name and twin_name not in done | record["variants"].keys():
        facts = {"kind": "random", "method": "random", "adaptive": False, "wanted": job.wanted}
        yield twin_name, {**facts, "set": twin, **run_random(bench, twin_name, bench.sparse("random", twin))}


def search(bench: Bench, method: str, entry: Entry, wanted: float) -> Fit:
    """Options with which a method keeps the wanted share."""
    any_options = {**entry.options[0], **({"keep": wanted} if entry.knob == "keep" else {})}
    _, _, layout = bench.arrange(bench.sparse(method, any_options))

    def keeps(options: Options) -> float:
        place = json.dumps([method, options])
        if place not in bench.keeps:
            sparse = bench.sparse(method, options)
            bench.keeps[place] = (
                planned_keep(bench, sparse) if entry.static else tried_keep(bench, entry, sparse)
            )
        return bench.keeps[place]

    # Half a block is as near as a budget in blocks can come.
    return fit(entry, wanted, keeps, layout, max(0.01 * wanted, 0.5 / layout.n_blocks))


def planned_keep(bench: Bench, sparse: SparseOptions) -> float:
    """What a plan that follows from the layout alone keeps."""
    import torch

    from dit_accel.quality.recall import keep_by_head

    method, _, layout = bench.arrange(sparse)
    tokens = torch.zeros(1, layout.n_tokens, 1, 8)
    return float(keep_by_head(method.predict(tokens, tokens, layout, None, None)).mean())


def tried_keep(bench: Bench, entry: Entry, sparse: SparseOptions) -> float:
    """What some options keep in a run of few steps, or of all."""
    steps = bench.steps if entry.whole_run else bench.fit_steps
    report = watch_run(bench, sparse, bench.prompts[:2], steps, lambda handle: None)
    if not report.sparse_calls:
        reasons = ", ".join(report.dense_reasons)
        raise SystemExit(f"{sparse.method}: nothing ran sparse in {steps} steps ({reasons}); see --fit-steps")
    return report.keep_achieved


def control_of(bench: Bench, method: str, options: Options, keep: float) -> tuple[str, Options]:
    """Name and options of the control that draws as many blocks as a method reads.

    A method that forces no block of its own stands beside a control that is given the query's own block.
    """
    from dit_accel.methods import method_options

    made, made_for, layout = bench.arrange(bench.sparse(method, options))
    forced = {name: getattr(made, name, None) for name in method_options("random") - {"seed"}}
    forced = {name: value for name, value in forced.items() if value is not None}
    blocks = max(1, round(keep * layout.n_blocks))
    tile = "" if made_for.tile is None else " of " + "x".join(map(str, made_for.tile))
    words = [f"{made_for.order} {made_for.block}{tile}"]
    words += [f"{name} {value}" for name, value in sorted(forced.items()) if value]
    carried = {name: options[name] for name in ("predict_every", "share_plans") if name in options}
    words += [f"{name} {value}" for name, value in carried.items()]
    # Rounded down: a share a hair above so many blocks would stand for one more.
    twin = {"keep": math.floor(1e6 * blocks / layout.n_blocks) / 1e6, **asdict(made_for), **forced, **carried}
    return f"random ({', '.join(words)})@{blocks}/{layout.n_blocks}", twin


def note(record: dict, path: Path, name: str, told: dict) -> None:
    """Add a variant to the record, and write it."""
    record["variants"][name] = told
    write_record(path, record)
    figures = told["figures"]
    line = f"{name}: {figures['denoise_seconds_per_prompt']:.2f} s a prompt"
    if figures.get("psnr_mean") is not None:
        line += f", PSNR {figures['psnr_mean']:.2f} dB"
    if figures["achieved_keep"] is not None:
        line += f", keep {figures['achieved_keep']:.3f}"
    print(line, flush=True)


def write_record(path: Path, record: dict) -> None:
    """Write a record whole or not at all; a line for each variant."""
    lines = [f"  {json.dumps(name)}: {json.dumps(told)}" for name, told in record["variants"].items()]
    rest = json.dumps({key: value for key, value in record.items() if key != "variants"}, indent=1)
    text = rest.removesuffix("\n}") + ',\n "variants": {\n' + ",\n".join(lines) + "\n }\n}\n"
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def done_in(records: list[dict], like: dict) -> set[str]:
    """Names of what records of the same run hold, found to be out of reach included."""
    need_one_run(records, like)
    unreached = {_name_of(one) for record in records for one in record["unreached"]}
    return unreached.union(*(record["variants"] for record in records))


def least_kept(records: list[dict], job: Job) -> dict | None:
    """What a record shall say of a job whose method was found to keep too much at a larger share; None: it may do."""
    for one in (one for record in records for one in record["unreached"]):
        if job.method == one["method"] and job.wanted < one["wanted"] < one["nearest"]:
            return {**one, "wanted": job.wanted}
    return None


def need_one_run(records: list[dict], first: dict) -> None:
    """Raises SystemExit for records of different models, sizes, prompts and so on."""
    for record in records:
        for key in _SHARED:
            if record[key] != first[key]:
                raise SystemExit(
                    f"these shards are not of one run: {key} is {first[key]!r} and {record[key]!r}"
                )


def merge(records: list[dict]) -> dict:
    """One record of all shards' variants, of several runs too if only their methods or keeps differ.

    What two of them ran, as controls, counts once.
    """
    first = records[0]
    need_one_run(records[1:], first)
    merged = {**first, "shard": None, "variants": {}}
    merged.pop("environment", None)
    merged["environments"] = [one for record in records for one in _environments_of(record)]
    for record in records:
        dense = record["variants"]["dense"]["figures"]["denoise_seconds_per_prompt"]
        for name, told in record["variants"].items():
            # every shard has timed dense attention on its own device; a merged record says so of each variant
            merged["variants"].setdefault(name, {"dense_seconds": dense, **told})
    merged["failed"] = [one for record in records for one in record["failed"]]
    known = done_in(records, first)
    for key in ("left", "unreached"):  # by one shard; another may have done it
        every = {json.dumps(one): one for record in records for one in record[key]}
        merged[key] = list(every.values())
    merged["left"] = [one for one in merged["left"] if _name_of(one) not in known]
    merged["keeps"] = sorted({keep for record in records for keep in record["keeps"]}, reverse=True)
    return merged


def _environments_of(record: dict) -> list[dict]:
    """Of one run, or of all that a merged record was made from."""
    return record.get("environments") or [record["environment"]]


def _name_of(one: dict) -> str:
    return Job(one["method"], one["wanted"], one.get("dense")).name


if __name__ == "__main__":
    main()
