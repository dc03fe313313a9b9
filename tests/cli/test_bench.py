"""`dit-accel bench`: what is measured, what it says, and how it ends when something is wrong."""

from __future__ import annotations

import json
import math
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dit_accel.bench.results import RESULTS, Results, load_results
from dit_accel.cli import doctor
from dit_accel.cli.app import run
from dit_accel.errors import NotFiniteError
from dit_accel.guards import OUT_OF_MEMORY
from dit_accel.kernels import block_sparse as kernels
from dit_accel.pipelines import wan
from dit_accel.pipelines.video import read_clip

SMALL = ("--size", "64x64", "--frames", "5", "--prompt", "a red star")
# Nine of twelve steps are not computed, so that it is faster than dense on any machine.
PRESETS = """
[mine]
extends = "wan21-dense"
cache = { name = "latent", schedule = "110000000001", min_steps = 1 }
[slow]
extends = "wan21-fast"
sparse = { block = 16, min_tokens = 0, dense_above = 1.0 }
"""
MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.6 GiB of which ..."


@pytest.fixture
def bench(
    wan21_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Iterator[Callable[..., int]]:
    """`dit-accel bench` in this process; returns the exit code. The doctor's kernel tests have tests of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(doctor, "check_kernels", lambda: iter(()))
    Path("dit-accel.toml").write_text(PRESETS)
    log = diffusers.utils.logging
    before = log.get_verbosity()

    def bench(*arguments: str) -> int:
        return run(["bench", *SMALL, "--model", str(wan21_folder), "--out", "out", *arguments])

    yield bench
    log.set_verbosity(before)
    log.enable_progress_bar()


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, fault: float | Exception) -> None:
    """Have the executor's result be wrong from some call on."""
    execute, calls = kernels.block_sparse, [0]

    def wrong(*args: Any, **known: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = execute(*args, **known)
        calls[0] += 1
        if calls[0] >= first:
            if isinstance(fault, Exception):
                raise fault
            out[..., 0, 0] = fault
        return out, lse

    monkeypatch.setattr(kernels, "block_sparse", wrong)


def results() -> Results:
    return load_results(Path("out"))


def test_everything_is_measured_side_by_side(bench, capsys):
    assert bench("--preset", "mine", "--against", "slow", "--seeds", "1,2", "--rounds", "3", "--steps", "12") == 0
    told = capsys.readouterr()
    found = results()
    assert found.complete and found.problems == ()
    names = [variant.name for variant in found.variants]
    assert names[:4] == ["dense", "mine", "slow", "dense again"]
    dense, mine, slow, again = found.variants[:4]

    # medians and ratios are those of the rounds
    for variant in found.variants:
        assert variant.seconds == median(run.seconds for run in variant.runs)
        assert variant.quartiles[0] <= variant.seconds <= variant.quartiles[1]
        assert variant.warm_up_seconds > 0
    assert [(run.round, run.clip) for run in mine.runs] == [(0, 0), (1, 1), (2, 0)]
    gain = found.gains[0]
    assert gain.whole == dense.seconds / mine.seconds > 1
    ratios = [a.seconds / b.seconds for a, b in zip(dense.runs, mine.runs, strict=True)]
    assert (gain.whole_low, gain.whole_high) == (min(ratios), max(ratios))

    # the parts add up to a median run
    for variant in (dense, mine, slow):
        parts = variant.breakdown
        assert parts.total == pytest.approx(variant.seconds, rel=1e-9)
        assert min(parts.text_encoder, parts.attention, parts.rest_of_transformer, parts.vae_decode) > 0
    assert gain.amdahl_bound == pytest.approx(1 / (1 - dense.breakdown.attention_share))
    assert again.breakdown is None

    # what ran: two branches of twelve steps, four layers, three rounds
    assert dense.ran is None and again.ran is None
    calls = slow.ran.sparse_calls + slow.ran.dense_calls
    assert calls == 2 * 12 * 4 * 3 and slow.ran.dense_reasons == {"dense layer": slow.ran.dense_calls}
    assert mine.ran.decisions == {"transformer": "110000000001"} and mine.ran.fallbacks == {}
    assert mine.ran.forwards == {"computed": 2 * 3 * 3, "reused": 2 * 9 * 3}
    assert slow.ran.keep_requested == 0.25 and slow.ran.keep_achieved == 0.5  # one of two blocks

    # clips, against dense of the same seed
    assert [(clip.prompt, clip.seed) for clip in found.clips] == [("a red star", 1), ("a red star", 2)]
    for variant in found.variants:
        assert [made.clip for made in variant.clips] == [0, 1]
        for made in variant.clips:
            assert all((Path("out") / name).is_file() for name in (*made.files, *made.worst_frame_files))
            assert (made.quality is None) == (variant is dense)
    quality = mine.clips[1].quality
    assert min(p for p in quality.frame_psnr_db) == quality.worst_psnr_db
    assert read_clip(Path("out") / mine.clips[1].files[0])[0].shape == (5, 64, 64, 3)
    assert not np.array_equal(*(read_clip(Path("out") / made.files[0])[0] for made in dense.clips))

    # dense at equal time
    rival = next(one for one in found.equal_time if one.preset == "mine")
    assert 1 <= rival.steps < 12
    assert {rival.below, rival.above} <= {variant.name for variant in found.of_kind("fewer steps")}
    assert found.variant(rival.below).steps <= rival.steps <= found.variant(rival.above).steps

    work = found.workload
    assert (work.video_tokens, work.text_tokens, work.passes_per_step) == (2 * 4 * 4, 0, 2)
    assert work.weights == "unknown" and work.options["slow"]["sparse"]["block"] == 16
    assert {one.what for one in found.not_run} >= {"5 rounds", "8 prompts with 2 seeds"}
    assert "times as fast as dense" in found.verdict and found.verdict in told.out
    assert told.out.splitlines()[-1] == "out/index.html" and found.verdict in Path("out/index.html").read_text()
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]

    # a second time with --resume there is nothing to do
    before = Path("out", RESULTS).read_text()
    assert bench(
        "--preset", "mine", "--against", "slow", "--seeds", "1,2", "--rounds", "3", "--steps", "12", "--resume"
    ) == 0  # fmt: skip
    assert Path("out", RESULTS).read_text() == before

    # and another workload is none to resume
    assert bench("--preset", "mine", "--rounds", "3", "--steps", "12", "--resume") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: --resume: what was begun there differs in --preset and --against")
    assert "seeds" in told
    assert Path("out", RESULTS).read_text() == before


QUICK = ("--preset", "slow", "--steps", "2", "--rounds", "1", "--fewer-steps", "off")


def test_a_clip_that_is_not_finite_forbids_gains(bench, monkeypatch, capsys):
    # past warming up (8 calls) and the first call of every layer, which the guards look at
    spoil(monkeypatch, 13, math.nan)
    assert bench(*QUICK) == 1
    found, told = results(), capsys.readouterr().out
    (problem,) = found.problems
    assert problem.startswith("slow, clip 1: not finite")
    assert found.gains == () and found.verdict.startswith("No gain is told") and problem in found.verdict
    assert "No gain is told" in told and "x as fast" in told
    assert found.variant("slow").runs == () and found.variant("dense").runs
    row = next(line for line in told.splitlines() if "dense again" in line)
    assert [cell.strip() for cell in row.split("│")][4] == "", "no ratio where a check failed"


def test_where_dense_is_not_finite_nothing_else_is_made(bench, monkeypatch, capsys):
    made, stock = [], wan.run_stock

    def fails(*args: Any, **known: Any) -> np.ndarray:
        made.append(1)
        if len(made) > 1:  # the first one is the look at the model
            raise NotFiniteError("NaN")
        return stock(*args, **known)

    monkeypatch.setattr(wan, "run_stock", fails)
    assert bench(*QUICK) == 1
    found = results()
    assert len(made) == 2 and found.complete and found.gains == ()
    assert found.problems == ("dense, clip 1: not finite: NaN",) and found.problems[0] in found.verdict
    assert "failed" in capsys.readouterr().out


def test_a_fall_back_is_told_and_under_strict_forbids_gains(bench, monkeypatch, capsys):
    spoil(monkeypatch, 1, torch.OutOfMemoryError(MEMORY))
    assert bench(*QUICK) == 0
    slow = results().variant("slow")
    assert slow.ran.fallbacks == {OUT_OF_MEMORY: slow.ran.fallbacks[OUT_OF_MEMORY]} and slow.ran.sparse_calls == 0
    assert "unplanned" in capsys.readouterr().out
    assert bench(*QUICK, "--set", "strict=true") == 4
    (problem,) = results().problems
    assert problem.startswith("slow, clip 1: strict fall-back") and OUT_OF_MEMORY in problem


def test_a_disk_that_takes_no_more(bench, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        assert bench(*QUICK) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: cannot write out/") and "File too large" in told
    assert not Path("out").exists(), "no half file and no new folder"


def test_random_weights_say_nothing_about_quality(bench, capsys):
    assert bench(*QUICK, "--random-weights", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(Path("out", RESULTS).read_text())
    assert "the weights are random" in told["verdict"] and "dB" not in told["verdict"]


@pytest.mark.parametrize(
    "given, said",
    [
        (("--preset", "wan21-fats"), "Did you mean 'wan21-fast'?"),
        (("--preset", "wan21-dense"), "preset 'wan21-dense' is dense, and dense is measured anyway"),
        (("--preset", "slow", "--against", "slow"), "preset 'slow' is asked for twice"),
        (("--preset", "slow", "--against", "flux-fast"), "both must be for one model"),
        (("--preset", "slow", "--rounds", "0"), "--rounds 0: at least 1 is needed"),
        (("--preset", "slow", "--seeds", "1,1"), "--seeds 1,1: whole numbers from 0"),
        (("--preset", "slow", "--size", "60x64"), "60"),
        (("--preset", "slow", "--steps", "4", "--fewer-steps", "4"), "whole numbers from 1 to 3"),
        (("--preset", "slow", "--out", "file"), "--out file is a file"),
        (("--preset", "slow", "--out", "full"), "folder full holds files that no earlier bench wrote"),
        (("--preset", "slow", "--out", "new", "--resume"), "new holds no results.json"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(bench, capsys, given, said):
    Path("file").write_text("x")
    Path("full").mkdir()
    Path("full", "mine.txt").write_text("x")
    assert bench(*given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
    assert not Path("out").exists() and not Path("new").exists()


def test_interrupted_and_resumed(bench: Callable, start_cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    asked = ("--preset", "slow", "--steps", "6", "--rounds", "4", "--fewer-steps", "5")
    process = start_cli("bench", *SMALL, "--model", wan21_folder, "--out", "out", *asked, cwd=tmp_path)
    file, until = tmp_path / "out" / RESULTS, time.monotonic() + 100
    while not (file.exists() and len(json.loads(file.read_text())["variants"]) > 1):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in told
    assert "--resume goes on from there" in told
    half = load_results(tmp_path / "out")
    assert not half.complete and half.verdict is None
    runs = half.variant("dense").runs
    assert 1 <= len(runs) <= 4

    assert bench(*asked, "--resume") == 0
    whole = load_results(tmp_path / "out")
    assert whole.complete and whole.date == half.date
    assert whole.variant("dense").runs[: len(runs)] == runs, "what is there is not measured again"
    assert len(whole.variant("dense").runs) == len(whole.variant("slow").runs) == 4
