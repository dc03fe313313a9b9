"""The page's end: what was not run, the workload, the machine and the command."""

from __future__ import annotations

from dit_accel.bench.results import Results
from dit_accel.quality.page.model import Section, Table


def show_origins(results: Results) -> list[Section]:
    """What a reader needs to judge the rest, or to run it again."""
    return [
        *_not_run(results),
        Section("workload", "Workload", tables=(_workload(results), _prompts(results), _options(results))),
        Section("machine", "Machine", tables=(_machine(results), _checks(results))),
        Section("command", "The command", (f"Begun {results.date}.",), code=results.command),
    ]


def _not_run(results: Results) -> list[Section]:
    points = [(one.what, one.why) for one in results.not_run]
    told = {what for what, _ in points}
    memory = {variant.memory.missing for variant in results.variants if variant.memory.missing}
    points += [("peak memory", why) for why in sorted(memory) if "peak memory" not in told]
    qualities = [made.quality for variant in results.variants for made in variant.clips if made.quality]
    lpips = {quality.lpips_missing for quality in qualities if quality.lpips_missing}
    points += [("LPIPS", why) for why in sorted(lpips) if "LPIPS" not in told]
    return [Section("not-run", "What was not run, and why", points=tuple(points))] if points else []


def _workload(results: Results) -> Table:
    w = results.workload
    guided = f"{w.guidance:g}, {w.passes_per_step} pass{'es' if w.passes_per_step > 1 else ''} a step"
    rows = [
        ("presets", ", ".join(w.presets)),
        ("changed with --set", ", ".join(w.settings) or "nothing"),
        ("model", f"{w.model}, {w.weights} weights"),
        ("size", f"{w.width}x{w.height}" + (f", {w.frames} frames at {w.fps:g} a second" if w.frames > 1 else "")),
        ("tokens in one self-attention", f"{w.video_tokens} of the picture, {w.text_tokens} of text"),
        ("steps", str(w.steps)),
        ("guidance", guided),
        ("scheduler", w.scheduler),
        ("dtype, device", f"{w.dtype}, {w.device}"),
        ("offload", w.offload),
        ("compiled", "yes" if w.compiled else "no"),
        ("rounds asked for", str(w.rounds)),
    ]
    rows += [
        (f"{v.name}: warm-up, not counted", f"{v.warm_up_seconds:.3g} s" + (f"; {v.about}" if v.about else ""))
        for v in results.variants
    ]
    return Table("What was asked for", ("what", "value"), tuple(rows))


def _prompts(results: Results) -> Table:
    rows = tuple((str(n), clip.prompt, str(clip.seed)) for n, clip in enumerate(results.clips))
    return Table("Prompts and seeds", ("clip", "prompt", "seed"), rows, folded=len(rows) > 4)


def _options(results: Results) -> Table:
    rows = []
    for preset, options in results.workload.options.items():
        for group in ("sparse", "cache", "region"):
            told = options.get(group)
            if isinstance(told, dict):
                values = ", ".join(f"{key} = {value}" for key, value in told.items() if value is not None)
                rows.append((preset, group, values))
    return Table("What the presets set", ("preset", "part", "values"), tuple(rows), folded=True)


def _machine(results: Results) -> Table:
    e = results.environment
    rows = [("chip", e.chip), ("platform", e.platform)]
    rows += [(name, value) for name, value in (("driver", e.driver), ("CUDA", e.cuda)) if value is not None]
    if e.power_limit_watts is not None:
        rows.append(("power limit", f"{e.power_limit_watts:g} W"))
    if e.dense_kernels:
        told = ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in e.dense_kernels.items())
        rows.append(("one dense self-attention", told))
    rows += [("commit", e.commit or "not a checkout"), *e.versions.items()]
    return Table("Environment", ("what", "value"), tuple(rows))


def _checks(results: Results) -> Table:
    rows = tuple((check.name, check.status, check.detail) for check in results.environment.checks)
    return Table("What doctor found", ("check", "status", "detail"), rows, folded=True)
