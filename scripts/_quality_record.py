"""The record of a quality evaluation: what it holds, how shards merge, and the table that is printed from it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

from dit_accel.cli.environment import find_commit
from dit_accel.quality.prompt_accuracy import measure_accuracy
from dit_accel.quality.readings import ATTRIBUTES, AttributeMatch

ROOT = Path(__file__).resolve().parent.parent
# Facts that shards of one evaluation must share; a record of mixed runs would say nothing.
_SHARED = (
    "model",
    "variants",
    "options",
    "grid",
    "seed",
    "prompts",
    "steps",
    "size",
    "frames",
    "dtype",
    "batch",
)


def describe_environment(device) -> dict:
    import torch

    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "diffusers", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = getattr(sys.modules.get(name), "__version__", None)
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "chip": chip,
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": find_commit(ROOT) or os.environ.get("DIT_ACCEL_COMMIT"),
        "command": " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def merge_records(records: list[dict]) -> dict:
    """One record of all shards' prompts. Refuses shards of different runs, repeated or missing prompts."""
    first = records[0]
    for record in records[1:]:
        for key in _SHARED:
            if record[key] != first[key]:
                raise SystemExit(
                    f"these shards are not of one run: {key} is {first[key]!r} and {record[key]!r}"
                )
    merged = {**first, "shard": None, "environments": [r["environment"] for r in records]}
    del merged["environment"]
    merged["rows"] = {}
    for variant in first["variants"]:
        rows = sorted((row for r in records for row in r["rows"][variant]), key=lambda row: row["prompt"])
        if [row["prompt"] for row in rows] != list(range(first["prompts"])):
            raise SystemExit(f"variant {variant}: the shards do not hold every prompt exactly once")
        merged["rows"][variant] = rows
    merged["calls"] = {v: [c for r in records for c in r["calls"][v]] for v in first["variants"]}
    merged["summary"] = summarise(merged)
    return merged


def summarise(record: dict) -> dict:
    """Figures of every variant over all prompts."""
    return {variant: _summarise_variant(record, variant) for variant in record["variants"]}


def _summarise_variant(record: dict, variant: str) -> dict:
    rows = record["rows"][variant]
    still = record["frames"] == 1
    everyone = measure_accuracy([AttributeMatch(**row["match"]) for row in rows], still=still)
    pairs = [AttributeMatch(**row["match"]) for row in rows if row["objects"] > 1]
    calls = record["calls"][variant]
    sparse, dense = sum(c["sparse"] for c in calls), sum(c["dense"] for c in calls)
    weighted = [(c["keep"], c["sparse"]) for c in calls if c["keep"] is not None and c["sparse"]]
    figures = {
        "prompts": len(rows),
        "accuracy": {k: _as_figures(s) for k, s in everyone.items()},
        "two_objects": {k: _as_figures(s) for k, s in measure_accuracy(pairs, still=still).items()}
        if pairs
        else None,
        "seconds_per_prompt": mean(row["seconds"] for row in rows),
        "denoise_seconds_per_prompt": mean(row["denoise_seconds"] for row in rows),
        "sparse_share": sparse / (sparse + dense) if sparse + dense else 0.0,
        "achieved_keep": sum(k * n for k, n in weighted) / sum(n for _, n in weighted) if weighted else None,
        "forwards": dict(sum((Counter(c.get("forwards", {})) for c in calls), Counter())),
        "regions": dict(sum((Counter(c.get("regions", {})) for c in calls), Counter())),
        "fallbacks": dict(sum((Counter(c["fallbacks"]) for c in calls), Counter())),
        "executors": dict(sum((Counter(c["executors"]) for c in calls), Counter())),
    }
    compared = [row["compared"] for row in rows if row["compared"]]
    if compared:
        apart = [c for c in compared if c["psnr"] is not None]  # None: equal, an infinite PSNR
        figures["equal_clips"] = len(compared) - len(apart)
        figures["psnr_mean"] = mean(c["psnr"] for c in apart) if apart else None
        figures["psnr_min"] = min(c["psnr"] for c in apart) if apart else None
        figures["psnr_worst_frame"] = min(c["worst_psnr"] for c in apart) if apart else None
        figures["ssim_mean"] = mean(c["ssim"] for c in compared)
        figures["ssim_min"] = min(c["ssim"] for c in compared)
        if not still:
            figures["flicker_mean"] = mean(c["flicker"] for c in compared if c["flicker"] is not None)
    return figures


def _as_figures(share) -> dict:
    return {"right": share.right, "of": share.of, "share": share.value, "wilson95": share.interval}


def print_record(record: dict) -> None:
    summary = record["summary"]
    base = summary.get("dense")
    for variant, figures in summary.items():
        line = f"\n== {variant}: {figures['prompts']} prompts, {figures['seconds_per_prompt']:.2f} s a prompt"
        if base and variant != "dense":
            line += f", {base['seconds_per_prompt'] / figures['seconds_per_prompt']:.2f} x as fast as dense"
            whole = base["denoise_seconds_per_prompt"] / figures["denoise_seconds_per_prompt"]
            line += f" (denoising alone {whole:.2f} x)"
        print(line)
        if record["options"][variant]:
            keep = "none" if figures["achieved_keep"] is None else f"{figures['achieved_keep']:.3f}"
            print(
                f"   sparse calls {figures['sparse_share']:.1%}, achieved keep {keep}, executors "
                f"{figures['executors'] or 'none'}, fall-backs {figures['fallbacks'] or 'none'}"
            )
        if figures["forwards"]:
            print(f"   forwards {figures['forwards']}")
        if figures.get("regions"):
            print(f"   forwards with {figures['regions']}")
        if "psnr_mean" in figures:
            print_fidelity(figures)
        for name, cell in figures["accuracy"].items():
            low, high = cell["wilson95"]
            line = f"   {name:10} {cell['share']:7.1%}  [{low:.1%}, {high:.1%}]  {cell['right']}/{cell['of']}"
            if figures["two_objects"]:
                pair = figures["two_objects"][name]
                line += f"   two objects {pair['right']}/{pair['of']}"
            if base and variant != "dense":
                line += (
                    f"   {100 * (cell['share'] - base['accuracy'][name]['share']):+.1f} points against dense"
                )
            print(line)
        for attribute, wrong in count_misreads(record["rows"][variant]).items():
            if wrong:
                print(
                    f"   {attribute} asked > read: " + ", ".join(f"{w} {n}" for w, n in wrong.most_common(8))
                )


def print_fidelity(figures: dict) -> None:
    if figures["psnr_mean"] is None:
        print("   equal to dense, pixel for pixel")
        return
    told = [f"PSNR mean {figures['psnr_mean']:.2f} min {figures['psnr_min']:.2f} dB"]
    if "flicker_mean" in figures:
        told[0] += f", worst frame {figures['psnr_worst_frame']:.2f} dB"
    told.append(f"SSIM mean {figures['ssim_mean']:.4f} min {figures['ssim_min']:.4f}")
    if "flicker_mean" in figures:
        told.append(f"temporal change x {figures['flicker_mean']:.3f}")
    if figures["equal_clips"]:
        told.append(f"{figures['equal_clips']} equal")
    print("   against dense: " + "; ".join(told))


def count_misreads(rows: list[dict]) -> dict[str, Counter]:
    """What was asked and what was read instead, for prompts judged wrong; objects are paired by colour."""
    wrong = {attribute: Counter() for attribute in ATTRIBUTES}
    for row in rows:
        asked, read = row["asked"], row["read"]
        if asked["background"] != read["background"]:
            wrong["background"][f"{asked['background']} > {read['background']}"] += 1
        if not row["match"]["colour"]:
            names = [
                "+".join(sorted(o["colour"] for o in side["objects"])) or "nothing" for side in (asked, read)
            ]
            wrong["colour"][" > ".join(names)] += 1
        by_colour = {o["colour"]: o for o in read["objects"]}
        for want in asked["objects"]:
            seen = by_colour.get(want["colour"])
            for attribute in ("shape", "motion"):
                if seen and seen[attribute] != want[attribute]:
                    wrong[attribute][f"{want[attribute]} > {seen[attribute]}"] += 1
    return wrong
