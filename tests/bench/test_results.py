"""results.json: what was written is what is read, and what is not ours is refused in a sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dit_accel.bench.gains import find_problems, gain_of, say_verdict
from dit_accel.bench.ran import add_up
from dit_accel.bench.results import (
    Breakdown,
    Check,
    Clip,
    Environment,
    EqualTime,
    MadeClip,
    Memory,
    Quality,
    Ran,
    Results,
    Run,
    Variant,
    Workload,
    load_results,
    mean_psnr,
    worst_clip,
)
from dit_accel.bench.store import Store, check_folder
from dit_accel.bench.workload import check_same
from dit_accel.errors import UsageError

RAN = Ran(3, 0, 1, {"dense layer": 1}, {}, 0.25, 0.3, {0: 0.3}, {0: 0.2, 1: 0.4}, {"cpu": 3}, {}, {}, {}, {})


def variant(name: str, kind: str, seconds: tuple[float, ...], attention: float, *clips: MadeClip) -> Variant:
    """One of three runs, whose parts add up to the median."""
    middle = sorted(seconds)[1]
    return Variant(
        name=name,
        kind=kind,
        about="",
        of=None,
        steps=8,
        warm_up_seconds=1.0,
        runs=tuple(Run(n, 0, value) for n, value in enumerate(seconds)),
        seconds=middle,
        quartiles=(min(seconds), max(seconds)),
        breakdown=Breakdown(0.5, attention, middle - attention - 1.0, 0.25, 0.25, middle * 1.1),
        memory=Memory(None, None, "a CPU"),
        ran=RAN if kind == "preset" else None,
        clips=clips,
    )


def made(clip: int, psnr: float | None, worst: float | None) -> MadeClip:
    quality = Quality(psnr is None, psnr, 0.9, 1, worst, (psnr, worst), 1.1, 0.01, None, "not run: lpips not installed")
    return MadeClip(clip, (f"media/{clip}.mp4",), (), None, quality)


@pytest.fixture
def results() -> Results:
    check = Check("torch", "ok", "2.13")
    environment = Environment("CPU", "Linux", {"torch": "2.13"}, None, None, None, None, (check,), {"math": 1.0})
    work = Workload(
        presets=("fast",), settings=("keep=0.3",), options={"fast": {"generate": {"steps": 8}}}, model="m",
        weights="trained", makes="video", width=64, height=64, frames=5, fps=16.0, video_tokens=32, text_tokens=0,
        steps=8, guidance=5.0, passes_per_step=2, scheduler="S", dtype="float32", device="cpu", offload="none",
        compiled=False, prompts=("x",), negative_prompt=None, seeds=(1, 2), rounds=3, fewer_steps="auto",
    )  # fmt: skip
    dense = variant("dense", "dense", (8.0, 10.0, 12.0), 6.0)
    fast = variant("fast", "preset", (4.0, 4.0, 8.0), 1.0, made(0, 30.0, 20.0), made(1, 26.0, 24.0))
    clips = (Clip("x", 1), Clip("x", 2))
    return Results("dit-accel bench", "2026-11-29T00:00:00+00:00", False, environment, work, clips, (dense, fast))


def test_what_is_written_is_what_is_read(results: Results, tmp_path: Path) -> None:
    Store(tmp_path, 16.0, ".mp4").write(results)
    assert load_results(tmp_path) == load_results(tmp_path / "results.json") == results
    assert check_folder(tmp_path, resume=True) == results


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda told: told.update(version=2), "is of version 2; this program reads version 1"),
        (lambda told: told.update(tool="x"), "is no result of dit-accel bench"),
        (lambda told: told.pop("clips"), "lacks clips"),
        (lambda told: told.update(more=1), "has unknown more"),
        (lambda told: told["variants"][0].update(kind="fast"), "variants[0].kind: 'fast' is none of dense"),
        (lambda told: told["workload"].update(width="64"), "workload.width: int is needed, not '64'"),
        (lambda told: told["workload"].update(width=True), "workload.width: int is needed, not True"),
        (lambda told: told["variants"][1]["ran"].update(keep_per_step=[1]), "keep_per_step: a table is needed"),
    ],
)
def test_what_is_not_ours_is_refused(results: Results, tmp_path: Path, spoil, said: str) -> None:
    told = results.to_dict()
    spoil(told)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(told))
    with pytest.raises(UsageError) as caught:
        load_results(file)
    assert said in str(caught.value) and str(file) in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read results"):
        load_results(tmp_path / "none")


def test_gains_are_ratios_of_medians_and_parts(results: Results) -> None:
    gain = gain_of(results.variant("fast"), results.variant("dense"))
    assert (gain.whole, gain.whole_low, gain.whole_high) == (2.5, 1.5, 2.5)
    assert gain.attention == 6.0 and gain.transformer == 9.0 / 3.0
    assert gain.amdahl_bound == 10.0 / 4.0


def test_quality_over_clips(results: Results) -> None:
    fast = results.variant("fast")
    assert mean_psnr(fast) == 28.0 and worst_clip(fast).clip == 0
    assert mean_psnr(results.variant("dense")) is None and worst_clip(results.variant("dense")) is None
    equal = replace(fast, clips=(made(0, None, None),))
    assert mean_psnr(equal) is None and worst_clip(equal) is None


def test_the_verdict_in_a_sentence(results: Results) -> None:
    gain = gain_of(results.variant("fast"), results.variant("dense"))
    told = replace(results, gains=(gain,))
    assert say_verdict(told) == "2.50 times as fast as dense (of 3 runs); PSNR 28.0 dB against dense"
    rival = EqualTime("fast", 3.5, "dense, 3 steps", "dense, 4 steps", 24.06, 28.0)
    told = replace(told, equal_time=(rival,))
    assert say_verdict(told).startswith("2.50 times as fast as dense (of 3 runs); at equal time 3.5 dense steps")
    assert say_verdict(told).endswith("reach 24.1 dB, this 28.0")
    random = replace(told, workload=replace(told.workload, weights="random"))
    assert "dB" not in say_verdict(random)
    slow = replace(told, gains=(replace(gain, whole=0.9),))
    assert "0.90 times as fast as dense (of 3 runs): it does not help here" in say_verdict(slow)


def test_what_is_broken_forbids_gains(results: Results) -> None:
    assert find_problems(results) == ()
    broken = replace(results.environment, checks=(Check("block_sparse/cpu", "broken", "error 1"),))
    lost = replace(results.variant("fast"), clips=(MadeClip(1, (), (), "not finite: NaN", None),))
    told = replace(results, environment=broken, variants=(results.variants[0], lost))
    assert find_problems(told) == (
        "fast, clip 2: not finite: NaN",
        "doctor: block_sparse/cpu is broken: error 1",
    )
    assert say_verdict(replace(told, problems=find_problems(told))).startswith("No gain is told, since a check failed")


def test_what_ran_adds_up() -> None:
    other = replace(RAN, sparse_calls=9, keep_achieved=0.1, keep_per_step={1: 0.0}, fallbacks={"NaN": 2})
    both = add_up(RAN, other)
    assert both.sparse_calls == 12 and both.dense_reasons == {"dense layer": 2} and both.fallbacks == {"NaN": 2}
    assert both.keep_achieved == pytest.approx((3 * 0.3 + 9 * 0.1) / 12)
    assert both.keep_per_step == pytest.approx({0: 0.2, 1: 0.1})
    assert add_up(None, RAN) == RAN


def test_only_the_same_is_resumed(results: Results) -> None:
    same = {"chip": "CPU", "versions": {"torch": "2.13"}, "commit": None}
    check_same(results, results.workload, same)
    with pytest.raises(UsageError, match="differs in --set, steps;"):
        check_same(results, replace(results.workload, steps=9, settings=()), same)
    for name, other in (("chip", "H200"), ("versions", {"torch": "2.14"}), ("commit", "0123")):
        with pytest.raises(UsageError, match=f"differs in {name} of the machine;"):
            check_same(results, results.workload, {**same, name: other})
