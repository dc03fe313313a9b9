"""The table that `bench` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dit_accel.bench.results import Results, Variant, mean_psnr, worst_clip

if TYPE_CHECKING:
    from rich.table import Table


def table_of(results: Results) -> Table:
    """A row for each variant. No ratio where a check failed, no quality where the weights are random."""
    from rich.markup import escape
    from rich.table import Table

    heads = ("variant", "runs", r"seconds \[quartiles]", "x as fast", "PSNR", "worst frame", "fewer steps, equal time")
    table = Table(*heads, "dense calls")
    for variant in results.variants:
        table.add_row(*map(escape, _row(results, variant)))
    return table


def _row(results: Results, variant: Variant) -> list[str]:
    random = results.workload.weights == "random"
    return [
        variant.name,
        str(len(variant.runs)),
        _seconds(variant),
        _ratio(results, variant),
        "" if random else _psnr(variant),
        "" if random else _worst(variant),
        "" if random else _rival(results, variant),
        _dense_calls(variant),
    ]


def _seconds(variant: Variant) -> str:
    if variant.seconds is None or variant.quartiles is None:
        return "failed"
    low, high = variant.quartiles
    return f"{variant.seconds:.2f} [{low:.2f}, {high:.2f}]"


def _ratio(results: Results, variant: Variant) -> str:
    dense = results.variants[0].seconds
    if results.problems or variant.kind == "dense" or variant.seconds is None or dense is None:
        return ""
    return f"{dense / variant.seconds:.2f}"


def _psnr(variant: Variant) -> str:
    if not any(made.quality for made in variant.clips):
        return ""
    psnr = mean_psnr(variant)
    return "equal" if psnr is None else f"{psnr:.1f} dB"


def _worst(variant: Variant) -> str:
    made = worst_clip(variant)
    return "" if made is None else f"{made.quality.worst_psnr_db:.1f} dB"


def _rival(results: Results, variant: Variant) -> str:
    rival = next((one for one in results.equal_time if one.preset == variant.name), None)
    return "" if rival is None or rival.psnr_db is None else f"{rival.psnr_db:.1f} dB ({rival.steps:.1f} steps)"


def _dense_calls(variant: Variant) -> str:
    if variant.ran is None:
        return ""
    calls = variant.ran.sparse_calls + variant.ran.linear_calls + variant.ran.dense_calls
    fallen = sum(variant.ran.fallbacks.values())
    return f"{variant.ran.dense_calls} of {calls}" + (f", {fallen} unplanned" if fallen else "")
