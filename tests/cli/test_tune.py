"""`dit-accel tune` on a small random Wan: a preset that is found and runs, nothing measured twice, clear ends."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dit_accel.cli.app import run
from dit_accel.cli.environment import identify
from dit_accel.preset import load_preset
from dit_accel.tuning.ways import MOST

SMALL = (
    "tune", "--preset", "wan21-fast", "--size", "64x64", "--frames", "5", "--prompt", "star", "--keeps", ".25,.5",
    "--set", "block=16", "--set", "min_tokens=0", "--buckets", "2", "--close", "1",
    "--perturbed", "2", "--polish", "2", "--follow", "--name", "mine",
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("one_thread")
def test_a_preset_is_made_found_and_run(
    here: Path, wan21_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*SMALL, "--model", str(wan21_folder), "--steps", "10")
    assert run([*arguments, "--budget", "time<=0.9", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert 0.7 < first["summary"]["tuned"]["computed_time"] <= 0.9
    ways = {one["way"]: one for one in first["ways"]}
    by = [(steps, kind) for steps in ("schedule", "threshold") for kind in ("sparse", "dense")]
    told = {f"steps by a {steps}, {kind} attention" for steps, kind in by}
    rows = [(most, kind) for most in MOST[1:] for kind in ("sparse", "dense")]
    told |= {f"steps by a threshold, {most} in a row at most, {kind} attention" for most, kind in rows}
    assert {"steps by a schedule, dense attention", "steps by a threshold, dense attention"} <= set(ways)
    assert {way for way in ways if not way.endswith("polished")} <= told  # sparse ones where some layer reads less
    (polished,) = (ways[way] for way in ways if way.endswith("polished"))
    assert polished["psnr"] >= ways[polished["way"].removesuffix(", polished")]["psnr"]
    assert all(one["computed_time"] <= 0.9 + 1e-9 for one in ways.values() if "schedule" in one["way"])
    fitting = [way for way in ways if ways[way]["computed_time"] <= 0.9 + 1e-6]
    assert max(fitting, key=lambda way: ways[way]["psnr"]).startswith(first["summary"]["way"])
    carried = [one["options"] for one in first["carried"] if one["taken"]]
    for key, value in (carried[-1] if carried and first["options"]["tuned"] else {}).items():
        assert first["options"]["tuned"][key] == value
    capsys.readouterr()
    measured = here / "presets" / "mine.measured"
    before = {path.name: path.stat().st_mtime_ns for path in measured.iterdir()}
    assert set(before) == {
        "settings.json", "sample-0-000.json", "frames-0-000.safetensors", "gains.json", "dense-000.safetensors",
    }  # fmt: skip

    sample = json.loads((measured / "sample-0-000.json").read_text())
    assert first["followed"] and [len(row) for row in sample["followed"]] == [2] * len(sample["attention"])

    # without --resume nothing is touched; with it nothing is measured twice, and the budget may be another
    assert run([*arguments, "--budget", "psnr>=12"]) == 2
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr("dit_accel.tuning.measuring.measure", lambda *_: pytest.fail("measured again"))
    assert run([*arguments, "--budget", "psnr>=12", "--resume", "--json"]) == 0
    told = capsys.readouterr()
    assert {path.name: path.stat().st_mtime_ns for path in measured.iterdir()} == before
    record = json.loads(told.out)
    assert record == json.loads((here / "presets" / "mine.json").read_text())
    assert record["verb"] == "tune" and record["summary"]["tuned"]["psnr"] >= 12
    assert record["held_out"] == [{"prompt": "star", "seed": 1001}] != record["tuned_on"]
    assert any(rival["name"].endswith("latent cache") for rival in record["rivals"])
    assert any(rival["name"].endswith("steps") for rival in record["rivals"])
    cost = record["summary"]["tuned"]["computed_time"]
    assert cost < 1, "12 dB is little: something was given up"

    # by the seconds measured here there may be none that takes about as long; then none is left of the first budget
    best = [one for one in record["rivals"] if one["name"] == record["summary"]["best_hand_set"]]
    assert (here / "presets" / "mine-rival.toml").exists() == bool(best)
    for one in best:
        rival = load_preset("mine-rival")
        assert rival.description == one["name"] and rival.generate == load_preset("mine").generate
        for key in ("sparse", "cache"):
            part = getattr(rival, key)
            assert (part and json.loads(json.dumps(part.to_mapping()))) == one["options"][key]
    assert record["options"]["tuned"] == record["summary"]["tuned"]["options"]["sparse"]

    preset = load_preset("mine")
    told = identify(torch.device("cpu"))
    assert preset.provenance.gpu == record["environment"]["chip"] == told["chip"]
    assert record["environment"]["commit"] == told["commit"]
    assert preset.status == "measured" and preset.provenance.record == "mine.json"
    assert preset.provenance.figures["psnr_db"].value == record["summary"]["tuned"]["psnr"]
    assert preset.generate.steps == 10 and preset.generate.width == 64
    assert run(["presets", "validate", "presets/mine.toml"]) == 0
    assert run(["generate", "--preset", "mine", "--prompt", "star", "--seed", "1001", "--compare-dense", "--json"]) == 0
    clip = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["clips"][0]
    assert clip["dense"]["psnr_db"] == pytest.approx(record["summary"]["tuned"]["psnr"], abs=0.01)

    # a rival of another budget does not stay beside a preset that has none
    (here / "presets" / "mine-rival.toml").write_text("version = 1\n")
    with monkeypatch.context() as patched:
        patched.setattr("dit_accel.tuning.write.best_hand_set", lambda *_: None)
        assert run([*arguments, "--budget", "psnr>=12", "--resume", "--quiet"]) == 0
    assert not (here / "presets" / "mine-rival.toml").exists()
    capsys.readouterr()

    # other settings are no settings to go on from
    assert run([*arguments, "--budget", "psnr>=12", "--resume", "--seeds", "2"]) == 2
    assert "prompts and seeds" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_a_budget_that_cannot_be_met_says_how_near_it_came(
    here: Path, wan21_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = (*SMALL, "--model", str(wan21_folder), "--steps", "3", "--cache", "none")
    assert run([*arguments, "--budget", "time<=0.01"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: budget time<=0.01 was not met") and "the best reached: time " in last
    assert not (here / "presets" / "mine.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "psnr<=30", "--prompt", "x"), "is no budget"),
        (("--budget", "psnr>=30"), "--prompt TEXT"),
        (("--budget", "psnr>=30", "--prompt", "x", "--keeps", "2"), "--keeps"),
        (("--budget", "psnr>=30", "--prompt", "x", "--seeds", "a"), "--seeds"),
        (("--budget", "psnr>=30", "--prompt", "x", "--held-out-seeds", "1"), "held-out clips must be others"),
        (("--budget", "psnr>=30", "--prompt", "x", "--methods", "sla"), "--methods"),
        (("--budget", "psnr>=30", "--prompt", "x", "--cache", "tea"), "--cache"),
        (("--budget", "psnr>=30", "--prompt", "x", "--name", "tiny-wan"), "ships with dit-accel"),
        (("--budget", "psnr>=30", "--prompt", "x", "--buckets", "0"), "--buckets"),
        (("--budget", "psnr>=30", "--prompt", "x", "--polish", "-1"), "--polish"),
    ],
)
def test_what_cannot_be_asked(
    arguments: tuple[str, ...], said: str, here: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(["tune", *arguments]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(here.iterdir())


def test_every_prompt_has_noise_of_its_own(
    here: Path, wan21_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("dit_accel.cli.tune._run", lambda _request, _folder, plan, *_: seen.append(plan) or ({}, []))
    arguments = (*SMALL, "--prompt", "moon", "--model", str(wan21_folder), "--budget", "psnr>=12")
    assert run([*arguments, "--seeds", "1,5"]) == 0, capsys.readouterr().err
    (plan,) = seen
    assert [(clip.prompt, clip.seed) for clip in plan.clips] == [("star", 1), ("star", 5), ("moon", 2), ("moon", 6)]
    assert [(clip.prompt, clip.seed) for clip in plan.held_out] == [("star", 1001), ("moon", 1002)]


def test_an_interrupt_keeps_what_was_measured(start_cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    more = ("--model", wan21_folder, "--steps", "60", "--budget", "psnr>=12")
    process = start_cli(*SMALL, *more, cwd=tmp_path)
    kept = tmp_path / "presets" / "mine.measured" / "dense-000.safetensors"
    until = time.monotonic() + 90
    while not kept.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "--resume goes on" in told and "Traceback" not in told
    assert sorted(path.name for path in kept.parent.iterdir()) == ["dense-000.safetensors", "settings.json"]
