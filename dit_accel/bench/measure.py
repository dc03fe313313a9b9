"""The whole of a bench: what is measured in which order, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dit_accel.bench.equal_time import compare_at_equal_time, neighbours, steps_in
from dit_accel.bench.gains import FEW_ROUNDS, find_problems, gain_of, say_verdict
from dit_accel.bench.results import EqualTime, NotRun, Results, Variant
from dit_accel.bench.session import Session, Subject
from dit_accel.preset import Preset

DENSE, AGAIN = "dense", "dense again"
ENOUGH_PROMPTS, ENOUGH_SEEDS = 8, 2  # for figures that speak of more than these clips


def measure(session: Session, presets: Sequence[Preset], kernels: Mapping[str, float]) -> Results:
    """Dense and the presets in turns, dense again, the parts of each, and fewer steps at equal time.

    Args:
        presets: of one workload; the first is the one that is asked about.
        kernels: of dense attention with their milliseconds, the quickest first; none leaves the choice to torch.

    Returns:
        The complete results, which are also written.
    """
    work, clips = session.results.workload, len(session.results.clips)
    names = tuple(kernels)
    dense = Subject(DENSE, "dense", None, work.steps, names, _about_dense(kernels))
    fast = [Subject(preset.name, "preset", preset, work.steps, names, preset.description) for preset in presets]
    session.measure_rounds([dense, *fast], max(work.rounds, clips))
    session.measure_rounds([_again(work.steps, names)], clips)
    for subject in (dense, *fast):
        session.measure_parts(subject)
    rivals, missing = [], []
    for subject in fast:
        rival = _measure_rival(session, subject, dense)
        (rivals if isinstance(rival, EqualTime) else missing).append(rival)
    return _finish(session, tuple(rivals), tuple(missing))


def count_generations(presets: int, clips: int, rounds: int, fewer_steps: str) -> int:
    """How many generations there will be, warming up apart; at most, where fewer steps are found on the way."""
    counts = {"off": 0, "auto": 2 * presets}.get(fewer_steps, len(fewer_steps.split(",")))
    return (1 + presets) * (max(rounds, clips) + 1) + clips * (1 + counts)


def _about_dense(kernels: Mapping[str, float]) -> str:
    if not kernels:
        return "the attention kernel that torch chooses"
    times = ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in kernels.items())
    return f"attention by the quickest of torch's kernels here, a self-attention each: {times}"


def _again(steps: int, kernels: Sequence[str]) -> Subject:
    """Dense once more, by another kernel where there is one: so far apart are two runs that are both right."""
    if len(kernels) > 1:
        return Subject(AGAIN, "dense again", None, steps, kernels[1:], f"by another kernel, {kernels[1]}")
    return Subject(AGAIN, "dense again", None, steps, kernels, "repeated: no other kernel runs this here")


def _measure_rival(session: Session, subject: Subject, dense: Subject) -> EqualTime | NotRun:
    """Dense with fewer steps in a preset's time."""
    results, title = session.results, f"fewer steps in the time of {subject.name}"
    asked = results.workload.fewer_steps
    if asked == "off":
        return NotRun(title, "--fewer-steps off")
    if subject.steps < 2:
        return NotRun(title, "one step is the fewest that there are")
    preset, base = results.variant(subject.name), results.variant(dense.name)
    if preset.breakdown is None or base.breakdown is None:
        return NotRun(title, f"{subject.name} or dense failed")
    steps = steps_in(preset.seconds, base.seconds, base.breakdown, subject.steps)
    if steps >= subject.steps:
        return NotRun(title, f"{subject.name} takes as long as dense or longer, so no steps would be saved")
    counts = neighbours(steps, subject.steps) if asked == "auto" else tuple(map(int, asked.split(",")))
    rivals = {count: _fewer(count, subject, dense) for count in dict.fromkeys(counts)}
    session.measure_rounds(list(rivals.values()), len(results.clips))
    found = {count: session.results.variant(rival.name) for count, rival in rivals.items()}
    whole = {count: variant for count, variant in found.items() if variant.seconds is not None}
    rival = compare_at_equal_time(session.results.variant(subject.name), steps, whole)
    return rival or NotRun(title, f"it would be {steps:.1f} steps, which --fewer-steps {asked} does not enclose")


def _fewer(count: int, subject: Subject, dense: Subject) -> Subject:
    noun = "step" if count == 1 else "steps"
    about = f"dense with {count} {noun} in place of {dense.steps}"
    return Subject(f"dense, {count} {noun}", "fewer steps", None, count, dense.kernels, about, of=subject.name)


def _finish(session: Session, rivals: tuple[EqualTime, ...], missing: tuple[NotRun, ...]) -> Results:
    results = replace(session.results, equal_time=rivals, gains=(), verdict=None)
    results = replace(results, problems=find_problems(results), not_run=(*_not_run(results), *missing))
    if not results.problems:
        dense = results.variant(DENSE)
        gains = tuple(gain_of(preset, dense) for preset in results.of_kind("preset"))
        results = replace(results, gains=gains)
    results = replace(results, verdict=say_verdict(results), complete=True)
    session.results = results
    session.store.write(results)
    session.store.tidy()
    return results


def _not_run(results: Results) -> tuple[NotRun, ...]:
    """What a report that readers trust holds, and this one does not."""
    work, found = results.workload, []
    if work.rounds < FEW_ROUNDS:
        found.append(NotRun(f"{FEW_ROUNDS} rounds", f"--rounds {work.rounds}: the spread is of few"))
    if len(work.prompts) < ENOUGH_PROMPTS or len(work.seeds) < ENOUGH_SEEDS:
        asked = f"{len(work.prompts)} and {len(work.seeds)} were asked for"
        found.append(NotRun(f"{ENOUGH_PROMPTS} prompts with {ENOUGH_SEEDS} seeds", f"{asked}: few to judge quality by"))
    lpips = _why_no_lpips(results.variants)
    if lpips is not None:
        found.append(NotRun("LPIPS", lpips))
    found.append(NotRun("VBench and other quality without a reference", "they need models that do not ship"))
    if work.weights == "random":
        found.append(NotRun("quality", "the weights are random: the figures are about speed alone"))
    return tuple(found)


def _why_no_lpips(variants: Sequence[Variant]) -> str | None:
    reasons = [made.quality.lpips_missing for variant in variants for made in variant.clips if made.quality]
    return next((reason for reason in reasons if reason), None)
