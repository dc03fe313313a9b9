"""The page's middle: where the time went, what was read, what fell back, memory and the floor of noise."""

from __future__ import annotations

from dit_accel.bench.results import Results, Variant, mean_psnr
from dit_accel.quality.page.charts import Point, draw_breakdown, draw_keep, draw_pareto
from dit_accel.quality.page.model import Chart, Section, Table


def show_costs(results: Results) -> list[Section]:
    """Every section that the results have something for."""
    drafts = (_time(results), _read(results), _calls(results), _memory(results), _floor(results))
    return [section for section in drafts if section is not None]


def _time(results: Results) -> Section | None:
    charts = [chart for chart in (_pareto(results), _breakdown(results)) if chart is not None]
    return Section("time", "Time", charts=tuple(charts)) if charts else None


def _pareto(results: Results) -> Chart | None:
    kinds = {"preset": "preset", "fewer steps": "dense, fewer steps"}
    points = [
        Point(
            # The kind says that it is dense already.
            f"{variant.steps} steps" if variant.kind == "fewer steps" else variant.name,
            variant.seconds,
            psnr,
            kinds[variant.kind],
            joined=variant.kind == "fewer steps",
        )
        for variant in results.variants
        if variant.kind in kinds and variant.seconds is not None and (psnr := mean_psnr(variant)) is not None
    ]
    if not points:
        return None
    points.sort(key=lambda point: point.kind != "preset")
    dense = next((variant.seconds for variant in results.of_kind("dense")), None)
    floor = next((mean_psnr(variant) for variant in results.of_kind("dense again")), None)
    return draw_pareto(points, dense, floor)


def _breakdown(results: Results) -> Chart | None:
    parts = {}
    for variant in results.variants:
        told = variant.breakdown
        if told is not None:
            parts[variant.name] = {
                "attention": told.attention,
                "rest of the transformer": told.rest_of_transformer,
                "text encoder": told.text_encoder,
                "VAE decode": told.vae_decode,
                "other": told.other,
            }
    return draw_breakdown(parts) if parts else None


def _read(results: Results) -> Section | None:
    charts = []
    for n, variant in enumerate(results.of_kind("preset")):
        ran = variant.ran
        if ran is None or not (ran.keep_per_step or ran.decisions):
            continue
        of = variant.name if len(results.of_kind("preset")) > 1 else "Keys read"
        skipped = skipped_steps(ran.decisions)
        charts.append(
            draw_keep(f"keep-step-{n}", f"{of}, by step", "step", ran.keep_per_step, variant.steps, skipped)
        )
        if ran.keep_per_layer:
            layers = 1 + max(ran.keep_per_layer)
            title = f"{of}, by layer"
            charts.append(draw_keep(f"keep-layer-{n}", title, "layer", ran.keep_per_layer, layers, frozenset()))
    rows = tuple(
        (
            variant.name,
            _share(variant.ran.keep_requested),
            _share(variant.ran.keep_achieved),
            "; ".join(f"{role}: {told}" for role, told in variant.ran.decisions.items()) or "no step cache",
        )
        for variant in results.variants
        if variant.ran is not None
    )
    if not rows:
        return None
    columns = ("variant", "keys asked for", "keys read", "steps computed (1) and skipped (0)")
    text = "Share of the keys that sparse attention read; means over heads and sparse calls of all timed runs."
    tables = (Table("Keys and steps", columns, rows),)
    return Section("read", "What was read, what was skipped", (text,), tables, tuple(charts))


def skipped_steps(decisions: dict[str, str]) -> frozenset[int]:
    """The steps that no transformer computed in any branch.

    Args:
        decisions: by transformer, a digit a step, 0 for a skipped one: "1101", or "cond=1101; uncond=1111".
    """
    rows = [part.rpartition("=")[2].strip() for told in decisions.values() for part in told.split(";")]
    length = max(map(len, rows), default=0)
    return frozenset(n for n in range(length) if all(row[n : n + 1] == "0" for row in rows))


def _calls(results: Results) -> Section | None:
    rows = []
    for variant in results.variants:
        if variant.ran is None:
            continue
        for reason, count in variant.ran.dense_reasons.items():
            unplanned = variant.ran.fallbacks.get(reason, 0)
            rows.append((variant.name, reason, str(count), str(unplanned)))
        rows += [(variant.name, f"guard: {what}", str(count), "–") for what, count in variant.ran.guards.items()]
    if not rows:
        none = "Every self-attention call of every preset ran sparse; nothing fell back."
        return Section("calls", "Dense calls", (none,)) if results.of_kind("preset") else None
    columns = ("variant", "reason", "calls", "of these unplanned")
    return Section("calls", "Dense calls and their reasons", tables=(Table("In all timed runs", columns, tuple(rows)),))


def _memory(results: Results) -> Section | None:
    found = [variant for variant in results.variants if variant.memory.peak_allocated is not None]
    if not found:
        return None  # `not_run` and the table of origins say why
    columns = ("variant", "peak allocated", "peak reserved")
    rows = tuple((v.name, _bytes(v.memory.peak_allocated), _bytes(v.memory.peak_reserved)) for v in found)
    return Section("memory", "Memory", tables=(Table("Most of GPU memory in any timed run", columns, rows),))


def _floor(results: Results) -> Section | None:
    again = results.of_kind("dense again")
    if not again:
        return None
    return Section("floor", "Noise floor", tuple(_floor_line(variant) for variant in again))


def _floor_line(variant: Variant) -> str:
    psnr = mean_psnr(variant)
    what = f"{variant.name} ({variant.about})"
    if not any(made.quality for made in variant.clips):
        return f"{what}: not compared."
    if psnr is None:
        return f"{what} equals dense pixel for pixel: every difference on this page is the preset's."
    return f"{what} is {psnr:.1f} dB from dense: no difference above that can be told from chance."


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _bytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**30:.2f} GiB"
