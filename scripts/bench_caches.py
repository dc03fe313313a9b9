"""Step caches against fewer steps: what each saves and how far from dense it ends, on held-out prompts.

    python scripts/bench_caches.py --model presets/models/tiny-wan --prompts 4 --batch 1 --out bench
    python scripts/bench_caches.py --report bench/record.json

The rival of a cache is a run with fewer steps: it needs no cache and costs as little. A cache that is worth its
name ends nearer to the run of all steps than fewer steps do at equal cost. The cost is the share of forwards that
ran, which no other program on the machine can disturb; seconds stand beside it. "Fewer steps" at that cost is
interpolated between the runs with fewer steps on either side.

Variants are those of evaluate_quality.py, and so are the runs, the judges and the record.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import _source_tree  # noqa: F401  (must come before dit_accel)
from _run_arguments import add_run_arguments
from evaluate_quality import add_evaluation_arguments, evaluate, finish, parse_variant
from rich.console import Console
from rich.table import Table

from dit_accel.preset import load_preset

VARIANTS = (
    "dense", "steps=14", "steps=10", "steps=7", "steps=5",
    "dense,cache=easy,cache.threshold=0.05", "dense,cache=easy,cache.threshold=0.1",
    "dense,cache=latent,cache.threshold=0.05", "dense,cache=latent,cache.threshold=0.1",
    "dense,cache=latent,cache.threshold=0.1,cache.order=2",
    "dense,cache=first_block,cache.threshold=0.06", "dense,cache=first_block,cache.threshold=0.12",
    "dense,cache=taylor,cache.interval=2", "dense,cache=taylor,cache.interval=3",
    "dense,cache=tokens,cache.interval=3", "dense,cache=tokens,cache.interval=3,cache.selector=random",
    "fast", "fast,cache=latent,cache.threshold=0.1",
)  # fmt: skip


def main() -> None:
    options = read_options()
    if options.report:
        print_table(json.loads(Path(options.report).read_text()))
        return
    if not options.model or not options.out:
        raise SystemExit("--model and --out are needed (or --report RECORD)")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    preset = load_preset(options.preset)
    steps = options.steps or preset.generate.steps
    variants = [parse_variant(text, preset, steps) for text in options.variants]
    record = evaluate(options, preset, steps, variants, (0, 1), out)
    finish(record, out / "record.json")
    print_table(record)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser)
    parser.add_argument("--preset", default="tiny-wan-fast", help="sampling and sparse options (tiny-wan-fast)")
    add_evaluation_arguments(parser)
    parser.add_argument("--report", metavar="RECORD", help="print the table of a record")
    parser.set_defaults(variants=list(VARIANTS), out=None)
    for action in parser._actions:
        action.required = False
    return parser.parse_args()


def print_table(record: dict) -> None:
    """A row for each variant, the cheapest last within its kind."""
    rows = {name: row_of(record, name) for name in record["variants"] if name != "dense"}
    fewer = sorted((row["cost"], row["psnr"]) for name, row in rows.items() if name.startswith("steps="))
    table = Table("variant", "forwards run", "seconds", "PSNR", "worst", "SSIM", "prompt", "fewer steps", "gain")
    base = record["summary"]["dense"]
    table.add_row("dense", "100%", f"{base['seconds_per_prompt']:.1f}", "", "", "", _accuracy(base), "", "")
    for name, row in rows.items():
        rival = None if name.startswith("steps=") else at_cost(fewer, row["cost"])
        table.add_row(
            name,
            f"{row['cost']:.0%}",
            f"{row['seconds']:.1f} ({base['seconds_per_prompt'] / row['seconds']:.2f}x)",
            f"{row['psnr']:.2f}",
            f"{row['worst']:.2f}",
            f"{row['ssim']:.4f}",
            row["accuracy"],
            "" if rival is None else f"{rival:.2f}",
            "" if rival is None else f"{row['psnr'] - rival:+.2f} dB",
        )
    Console(width=150).print(table)


def row_of(record: dict, name: str) -> dict:
    """Figures of one variant: its cost is the share of dense's forwards that ran."""
    figures = record["summary"][name]
    forwards = figures["forwards"]
    ran = forwards["computed"] / sum(forwards.values()) if forwards else 1.0
    steps = parse_variant(name, load_preset(record["preset"]), record["steps"]).steps
    return {
        "cost": ran * steps / record["steps"],
        "seconds": figures["seconds_per_prompt"],
        "psnr": figures["psnr_mean"],
        "worst": figures["psnr_min"],
        "ssim": figures["ssim_mean"],
        "accuracy": _accuracy(figures),
    }


def at_cost(fewer: list[tuple[float, float]], cost: float) -> float | None:
    """PSNR of fewer steps at a cost, on the line between its neighbours; None outside of what was run."""
    for (low, below), (high, above) in pairwise(fewer):
        if low <= cost <= high:
            return below + (above - below) * (cost - low) / (high - low)
    return None


def _accuracy(figures: dict) -> str:
    cells = figures["accuracy"].values()
    return f"{sum(c['right'] for c in cells)}/{sum(c['of'] for c in cells)}"


if __name__ == "__main__":
    main()
