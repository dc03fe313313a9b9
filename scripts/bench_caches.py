"""Caches and region sampling against fewer steps: what each saves and how far from dense it ends, on held-out prompts.

    python scripts/bench_caches.py --model presets/models/tiny-wan --prompts 4 --batch 1 --out bench
    python scripts/bench_caches.py --model DIR --device cuda:0 --shard 0/2 --prompts 16 --batch 1 --out bench
    python scripts/bench_caches.py --merge bench/record-*of2.json --out bench
    python scripts/bench_caches.py --report bench/record.json --docs docs/caches.md

The rival is a run with fewer steps: it needs no memory and costs as little. What is worth its name ends nearer to the
run of all steps than fewer steps do at equal cost. Cost is told twice: as the share of tokens that went through the
transformer, which no other program on the machine can disturb, and as seconds of a whole generation. "Fewer steps" at
that cost is interpolated between the runs with fewer steps on either side.

Variants are those of evaluate_quality.py, and so are the runs, the judges and the record; --report takes its records
too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import _source_tree  # noqa: F401  (must come before dit_accel)
from _pages import put_between
from _run_arguments import add_run_arguments
from evaluate_quality import add_evaluation_arguments, make_record, parse_variant
from rich.console import Console
from rich.table import Table

from dit_accel.bench.equal_time import at_cost
from dit_accel.preset import load_preset

VARIANTS = (
    "dense", "dense,compile=true", "steps=14", "steps=10", "steps=7", "steps=5",
    "dense,cache=easy,cache.threshold=0.05", "dense,cache=easy,cache.threshold=0.1",
    "dense,cache=latent,cache.threshold=0.05", "dense,cache=latent,cache.threshold=0.1",
    "dense,cache=latent,cache.threshold=0.1,cache.order=2",
    "dense,cache=first_block,cache.threshold=0.06", "dense,cache=first_block,cache.threshold=0.12",
    "dense,cache=taylor,cache.interval=2", "dense,cache=taylor,cache.interval=3",
    "dense,cache=tokens,cache.interval=3", "dense,cache=tokens,cache.interval=3,cache.selector=random",
    "dense,region=0.5", "dense,region=0.5,region.selector=change", "dense,region=0.5,region.selector=random",
    "dense,region=0.25", "dense,region=0.25,region.selector=random",
    "fast", "fast,cache=latent,cache.threshold=0.1", "fast,cache=latent,cache.threshold=0.2",
    "dense,region=0.5,cache=latent,cache.threshold=0.1", "fast,region=0.5",
    "fast,order=packed", "fast,order=packed,region=0.5,region.unit=block",
    "fast,order=packed,region=0.5,region.unit=block,region.selector=random",
    "fast,region=0.5,cache=latent,cache.threshold=0.1",
)  # fmt: skip


def main() -> None:
    options = read_options()
    if options.report:
        record = json.loads(Path(options.report).read_text())
        print_table(record)
        if options.docs:
            put_between(Path(options.docs), "caches", markdown_of(record))
        return
    print_table(make_record(options))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--preset", default="tiny-wan-fast", help="sampling and sparse options (tiny-wan-fast)"
    )
    add_evaluation_arguments(parser)
    parser.add_argument("--report", metavar="RECORD", help="print the table of a record")
    parser.add_argument("--docs", help="page between whose marks --report puts it")
    parser.set_defaults(variants=list(VARIANTS), out=None)
    for action in parser._actions:
        action.required = False
    return parser.parse_args()


HEAD = (
    "variant", "tokens run", "seconds", "PSNR", "worst", "SSIM", "prompt", "fewer steps, as many tokens",
    "fewer steps, as many seconds",
)  # fmt: skip


def print_table(record: dict) -> None:
    table = Table(*HEAD)
    for row in cells_of(record):
        table.add_row(*row)
    Console(width=170).print(table)


def markdown_of(record: dict) -> str:
    """The table of a record, and what was run."""
    where = (record.get("environment") or record["environments"][0])["chip"]
    size = f"{record['frames']} frames of {record['size']}x{record['size']}"
    prompts = f"{len(record['rows']['dense'])} prompts in batches of {record['batch']}"
    told = f"{record['model']}, {size}, {record['steps']} steps, {prompts}, {record['dtype']}, {where}."
    rows = [HEAD, ["---"] * len(HEAD), *cells_of(record)]
    return "\n".join([told, "", *("| " + " | ".join(row) + " |" for row in rows)])


def cells_of(record: dict) -> list[list[str]]:
    """A row for each variant. What fewer steps give at its cost stands with the difference to that."""
    rows = {name: row_of(record, name) for name in record["variants"] if name != "dense"}
    fewer = [row for name, row in rows.items() if name.startswith("steps=")]
    base = record["summary"]["dense"]
    cells = [["dense", "100%", f"{base['seconds_per_prompt']:.2f}", "", "", "", _accuracy(base), "", ""]]
    for name, row in rows.items():
        rivals = [
            None if row in fewer else at_cost(sorted((one[cost], one["psnr"]) for one in fewer), row[cost])
            for cost in ("cost", "seconds")
        ]
        cells.append(
            [
                name,
                f"{row['cost']:.0%}",
                f"{row['seconds']:.2f} ({base['seconds_per_prompt'] / row['seconds']:.2f}x)",
                f"{row['psnr']:.2f}",
                f"{row['worst']:.2f}",
                f"{row['ssim']:.4f}",
                row["accuracy"],
                *(
                    "" if rival is None else f"{rival:.2f} ({row['psnr'] - rival:+.2f} dB)"
                    for rival in rivals
                ),
            ]
        )
    return cells


def row_of(record: dict, name: str) -> dict:
    """Figures of one variant. Its cost is the share of dense's tokens that went through the transformer."""
    figures = record["summary"][name]
    forwards = figures["forwards"]
    ran = forwards["computed"] / sum(forwards.values()) if forwards else 1.0
    ran *= share_of_tokens(figures.get("regions") or {})
    steps = parse_variant(name, load_preset(record["preset"]), record["steps"]).steps
    return {
        "cost": ran * steps / record["steps"],
        "seconds": figures["seconds_per_prompt"],
        "psnr": figures["psnr_mean"],
        "worst": figures["psnr_min"],
        "ssim": figures["ssim_mean"],
        "accuracy": _accuracy(figures),
    }


def share_of_tokens(regions: dict[str, int]) -> float:
    """Of the forwards that ran, counted by "so many of so many tokens"."""
    counts = [
        (times, *map(int, told.removesuffix(" tokens").split(" of "))) for told, times in regions.items()
    ]
    whole = sum(times * tokens for times, _, tokens in counts)
    return sum(times * active for times, active, _ in counts) / whole if whole else 1.0


def _accuracy(figures: dict) -> str:
    cells = figures["accuracy"].values()
    return f"{sum(c['right'] for c in cells)}/{sum(c['of'] for c in cells)}"


if __name__ == "__main__":
    main()
