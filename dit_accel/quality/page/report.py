"""The page of `dit-accel bench`: what it gained and what it cost, in a reader's order."""

from __future__ import annotations

import json
from pathlib import Path

from dit_accel.bench.gains import FEW_ROUNDS
from dit_accel.bench.results import Clip, Gain, MadeClip, Results, Variant, mean_psnr, worst_clip
from dit_accel.quality.page.clips import Take, name_clip, show_clip
from dit_accel.quality.page.costs import show_costs
from dit_accel.quality.page.model import Fact, Page, Section, ShownClip, Table
from dit_accel.quality.page.origins import show_origins
from dit_accel.quality.page.place import NAME
from dit_accel.quality.page.render import save

MOST = 8  # clips embedded in one page; more would make it too heavy to open


def write_page(results: Results, folder: Path) -> Path:
    """Write index.html beside results.json: one file that needs nothing beside it.

    Args:
        results: whole, or as far as they got.
        folder: where the media files that they name lie, and where the page goes.

    Raises:
        EnvironmentProblem: matplotlib is not installed, or the file cannot be written.
        UsageError: a media file that is missing or broken.
    """
    page = folder / NAME
    save(lay_out(results, folder), page)
    return page


def lay_out(results: Results, folder: Path) -> Page:
    """What the page of some results shows."""
    asked = results.workload.presets[0]
    clips, left = _show_clips(results, folder)
    opened = "Players open at the worst frame. " if results.workload.frames > 1 else ""
    return Page(
        title=f"{', '.join(results.workload.presets)} against dense",
        verdict=results.verdict or "Not finished: there is no verdict yet.",
        warnings=_warnings(results),
        facts=_facts(results, asked),
        before=tuple(_gain(results)),
        clips=clips,
        clips_note=f"The clip whose worst frame under {asked} is farthest from dense comes first. {opened}"
        f"{left}The last picture is the difference of {asked} from dense, amplified.",
        after=(*show_costs(results), *show_origins(results)),
        raw=json.dumps(results.to_dict(), indent=1),
        raw_name="results.json",
    )


def _warnings(results: Results) -> tuple[str, ...]:
    told = [f"a check of correctness failed, so no gain is claimed: {problem}" for problem in results.problems]
    if not results.complete:
        told.append("the run ended early; this is what was measured until then.")
    if results.workload.weights == "random":
        told.append("the weights are random: times mean something here, likeness to dense says nothing of quality.")
    runs = min((len(variant.runs) for variant in results.variants), default=0)
    if runs < FEW_ROUNDS:
        told.append(f"the spread is that of few runs: {runs} of the variant with the fewest.")
    return tuple(told)


def _facts(results: Results, asked: str) -> tuple[Fact, ...]:
    facts = []
    gain = next((gain for gain in results.gains if gain.preset == asked), None)
    if gain is not None:
        spread = f"{gain.whole_low:.2f} to {gain.whole_high:.2f} over the rounds"
        facts.append(Fact("Whole generation", f"{gain.whole:.2f}×", f"as fast as dense; {spread}"))
    mine = next((variant for variant in results.variants if variant.name == asked), None)
    if mine is None:
        return tuple(facts)
    worst, psnr = worst_clip(mine), mean_psnr(mine)
    if any(made.quality for made in mine.clips):
        facts.append(Fact("PSNR to dense", "equal" if psnr is None else f"{psnr:.1f} dB", "mean over the clips"))
    if worst is not None:
        prompt = results.clips[worst.clip]
        note = f"seed {prompt.seed}: {prompt.prompt}"
        if results.workload.frames > 1:
            note = f"frame {worst.quality.worst_frame}, {note}"
        noun = "Worst frame" if results.workload.frames > 1 else "Worst image"
        facts.append(Fact(noun, f"{worst.quality.worst_psnr_db:.1f} dB", note))
    rival = next((equal for equal in results.equal_time if equal.preset == asked), None)
    if rival is not None and rival.psnr_db is not None:
        note = f"dense with {rival.steps:.3g} steps instead of {results.workload.steps}"
        facts.append(Fact("Fewer steps, equal time", f"{rival.psnr_db:.1f} dB", note))
    if mine.ran is not None:
        facts.append(Fact("Fall-backs", str(sum(mine.ran.fallbacks.values())), "dense calls nobody planned"))
    return tuple(facts)


def _gain(results: Results) -> list[Section]:
    sections = []
    if results.gains:
        columns = ("preset", "attention alone", "transformer", "whole generation", "least to most", "Amdahl's bound")
        table = Table("Times as fast as dense", columns, tuple(_gain_row(gain) for gain in results.gains))
        text = "A quick kernel is a quick generation only as far as attention takes its time: the bound is what the "
        text += "whole would gain if dense's attention took none."
        sections.append(Section("gain", "Kernel and whole", (text,), (table,)))
    columns = ("variant", "steps", "seconds", "quartiles", "runs", "× as fast", "PSNR, dB", "worst", "dense calls")
    rows = tuple(_row(variant, results) for variant in results.variants)
    tables = [Table("Median seconds of whole generations", columns, rows)]
    if results.equal_time:
        columns = ("preset", "its PSNR, dB", "dense in equal time", "its PSNR, dB")
        rows = tuple(
            (e.preset, _db(e.preset_psnr_db), f"{e.steps:.2f} steps", _db(e.psnr_db)) for e in results.equal_time
        )
        tables.append(Table("The honest rival: fewer steps of dense in the same time", columns, rows))
    return [*sections, Section("variants", "Every variant", tables=tuple(tables))]


def _gain_row(gain: Gain) -> tuple[str, ...]:
    parts = (gain.attention, gain.transformer, gain.whole)
    spread = f"{gain.whole_low:.2f}× to {gain.whole_high:.2f}×"
    return gain.preset, *map(_times, parts), spread, _times(gain.amdahl_bound)


def _row(variant: Variant, results: Results) -> tuple[str, ...]:
    dense = next((v.seconds for v in results.of_kind("dense")), None)
    worst = worst_clip(variant)
    ratio = dense / variant.seconds if dense and variant.seconds else None
    compared = any(made.quality for made in variant.clips)  # neither dense itself nor random weights are
    apart = _db(mean_psnr(variant)) if compared else "–"
    calls = "–" if variant.ran is None else f"{variant.ran.dense_calls} of {_calls(variant)}"
    return (
        variant.name,
        str(variant.steps),
        "–" if variant.seconds is None else f"{variant.seconds:.3g}",
        "–" if variant.quartiles is None else "{:.3g} to {:.3g}".format(*variant.quartiles),
        str(len(variant.runs)),
        # Where a check failed no gain is claimed, here either.
        "–" if results.problems else _times(ratio),
        apart,
        "–" if worst is None else f"{worst.quality.worst_psnr_db:.1f}",
        calls,
    )


def _calls(variant: Variant) -> int:
    return variant.ran.sparse_calls + variant.ran.linear_calls + variant.ran.dense_calls


def _times(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}×"


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _show_clips(results: Results, folder: Path) -> tuple[tuple[ShownClip, ...], str]:
    """The clips that dense and the preset both have, the worst first, and what to say of those left out."""
    work, asked = results.workload, results.workload.presets[0]
    named = {variant.name: variant for variant in results.variants}
    dense = next(iter(results.of_kind("dense")), None)
    if dense is None or asked not in named:
        return (), ""
    order = sorted(
        (made for made in named[asked].clips if made.quality and made.files and _made(dense, made.clip)),
        key=_worst,
    )
    rivals = [named[name] for name in work.presets[1:] if name in named]
    rivals += _rival(results, named[asked])
    shown = []
    for n, made in enumerate(order[:MOST]):
        clip = results.clips[made.clip]
        takes = [Take("dense", _files(dense, made.clip, folder), None, _seconds(dense))]
        for variant in (named[asked], *rivals):
            other = _made(variant, made.clip)
            if other is not None and other.quality is not None:
                takes.append(Take(variant.name, _paths(other, folder), other.quality, _seconds(variant)))
        told = f"{clip.prompt} (seed {clip.seed})"
        shown.append(show_clip(f"clip-{n}", _name(clip, made, work.frames), told, takes, work.fps))
    left = f"The {MOST} worst of {len(order)} are in this page; all are files beside it. " if len(order) > MOST else ""
    return tuple(shown), left


def _rival(results: Results, preset: Variant) -> list[Variant]:
    """Dense with the whole number of fewer steps that comes nearest to the preset's time."""
    found = [v for v in results.of_kind("fewer steps") if v.of == preset.name and v.seconds is not None]
    if preset.seconds is None:
        return []
    return sorted(found, key=lambda variant: abs(variant.seconds - preset.seconds))[:1]


def _made(variant: Variant, clip: int) -> MadeClip | None:
    return next((made for made in variant.clips if made.clip == clip and made.files), None)


def _files(variant: Variant, clip: int, folder: Path) -> tuple[Path, ...]:
    return _paths(_made(variant, clip), folder)


def _paths(made: MadeClip, folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in made.files)


def _seconds(variant: Variant) -> str:
    return "" if variant.seconds is None else f"{variant.seconds:.3g} s"


def _worst(made: MadeClip) -> float:
    worst = made.quality.worst_psnr_db
    return float("inf") if worst is None else worst


def _name(clip: Clip, made: MadeClip, frames: int) -> str:
    text = clip.prompt if len(clip.prompt) <= 60 else f"{clip.prompt[:57]}..."
    return name_clip(f"{text}, seed {clip.seed}", made.quality, frames)
