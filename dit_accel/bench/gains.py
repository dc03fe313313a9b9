"""What the measurements come to: gains, whether they may be told, and the verdict in a sentence. No torch."""

from __future__ import annotations

from dit_accel.bench.results import Breakdown, EqualTime, Gain, Results, Variant, mean_psnr

FEW_ROUNDS = 5  # fewer runs than this have no spread worth the name
STRICT = "strict fall-back"
NOT_FINITE = "not finite"


def find_problems(results: Results) -> tuple[str, ...]:
    """Checks of correctness that failed: with any of them a gain would be that of a wrong result."""
    found = [
        f"{variant.name}, clip {made.clip + 1}: {made.problem}"
        for variant in results.variants
        for made in variant.clips
        if made.problem is not None
    ]
    broken = [check for check in results.environment.checks if check.status == "broken"]
    return (*found, *(f"doctor: {check.name} is broken: {check.detail}" for check in broken))


def gain_of(preset: Variant, dense: Variant) -> Gain:
    """How many times as fast as dense a preset is. Both have run."""
    assert preset.seconds is not None and dense.seconds is not None
    base = {run.round: run.seconds for run in dense.runs}
    ratios = [base[run.round] / run.seconds for run in preset.runs if run.round in base]
    one, other = preset.breakdown, dense.breakdown
    return Gain(
        preset=preset.name,
        whole=dense.seconds / preset.seconds,
        whole_low=min(ratios),
        whole_high=max(ratios),
        transformer=_ratio(other, one, "attention", "rest_of_transformer"),
        attention=_ratio(other, one, "attention"),
        amdahl_bound=None if other is None else other.total / (other.total - other.attention),
    )


def _ratio(dense: Breakdown | None, preset: Breakdown | None, *parts: str) -> float | None:
    if dense is None or preset is None:
        return None
    above, below = (sum(getattr(side, part) for part in parts) for side in (dense, preset))
    return above / below if below else None


def say_verdict(results: Results) -> str:
    """One sentence about the preset that was asked about."""
    if results.problems:
        return f"No gain is told, since a check failed: {'; '.join(results.problems)}"
    gain, dense = results.gains[0], results.variant("dense")
    preset = results.variant(gain.preset)
    helps = "" if gain.whole > 1 else ": it does not help here"
    few = f" (of {len(dense.runs)} runs)" if len(dense.runs) < FEW_ROUNDS else ""
    line = f"{gain.whole:.2f} times as fast as dense{few}{helps}"
    if results.workload.weights == "random":
        return f"{line}; the weights are random, so that nothing is said about quality"
    rival = next((one for one in results.equal_time if one.preset == gain.preset), None)
    if rival is None or rival.psnr_db is None:
        return f"{line}; {_quality(preset)}"
    return f"{line}; at equal time {_steps(rival)} reach {rival.psnr_db:.1f} dB, {_of_preset(rival)}"


def _steps(rival: EqualTime) -> str:
    return f"{rival.steps:.1f} dense steps in place of all"


def _of_preset(rival: EqualTime) -> str:
    return "this is equal to dense" if rival.preset_psnr_db is None else f"this {rival.preset_psnr_db:.1f}"


def _quality(preset: Variant) -> str:
    psnr = mean_psnr(preset)
    return "equal to dense, pixel for pixel" if psnr is None else f"PSNR {psnr:.1f} dB against dense"
