"""finetune_sla.py on a random tiny Wan: latents, training, going on, comparing; what it refuses and how it says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SIZE = ("--size", "96x96", "--frames", "9", "--steps", "4")
HOW = ("--trains", "projection", "--mix", "--mix-rate", "0.5", "--block", "16", "--held-out", "1", "--device", "cpu",
       "--warmup", "2")  # fmt: skip


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import finetune_sla

        yield finetune_sla
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def run(script, monkeypatch, capsys, one_thread):
    """Run the script with some arguments; returns its exit code, and what it printed to stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["finetune_sla.py", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "150")  # tables break their heads where a terminal is narrow
        try:
            code = script.main()
        except SystemExit as end:
            code = end.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from dit_accel.testing import tiny_wan_pipeline

    folder = tmp_path_factory.mktemp("model")
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


def test_latents_training_and_comparison(run, model: Path, tmp_path: Path) -> None:
    latents = tmp_path / "latents"
    made = ("latents", "--model", model, "--scenes", "rendered", *SIZE, "--out", latents)
    assert run(*made, "--count", 2)[0] == 0
    code, _, err = run(*made, "--count", 4)
    assert code == 0 and "4 samples of 16x3x12x12" in err

    out = tmp_path / "sla"
    train = ("train", "--model", model, "--latents", latents, *HOW, "--out", out)
    code, told, err = run(*train, "--steps", 4)
    assert code == 0 and told.strip() == str(out / "transformer.safetensors") and "held-out samples" in err
    code, _, err = run(*train, "--steps", 8)
    assert code == 2 and "holds a run already: give --resume" in err
    assert run(*train, "--steps", 8, "--resume")[0] == 0
    record = json.loads((out / "record-transformer.json").read_text())
    assert record["steps"] == len(record["losses"]) == 8
    before, after = (record["velocity_error"][when] for when in ("before", "after"))
    assert after["overall"] < before["overall"] and after["guided"]["overall"] < before["guided"]["overall"]
    assert record["options"]["guided"] == 4 and record["options"]["guidance"] == 5.0
    assert record["chip"].startswith("CPU") and record["versions"]["accelerate"] and "--resume" in record["command"]

    code, table, _ = run(
        "evaluate", "--model", model, "--latents", latents, "--sla", out / "transformer.safetensors", "--count", 1,
        "--device", "cpu", "--out", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0 and all(way in table for way in ("pooled", "sla, untrained", "sla, trained"))
    ways = json.loads((tmp_path / "e.json").read_text())["ways"]
    errors = {name: way["error"]["overall"] for name, way in ways.items()}
    assert errors["sla, trained"] < min(errors["pooled"], errors["sla, untrained"])
    guided = {name: way["error"]["guided"]["overall"] for name, way in ways.items()}
    assert guided["sla, trained"] < min(guided["pooled"], guided["sla, untrained"])
    assert "guided velocity" in table
    assert ways["sla, trained"]["options"] == {"method": "sla", "weights": str(out / "transformer.safetensors")}

    levels = record["index"]["schedule"]["timesteps"]
    code, table, _ = run(
        "evaluate", "--model", model, "--latents", latents, "--count", 1, "--device", "cpu", "--shared-plans",
        "--below", levels[1] / 1000, "--guidance", 2, "--out", tmp_path / "low.json",
    )  # fmt: skip
    low = json.loads((tmp_path / "low.json").read_text())
    assert code == 0 and low["guidance"] == 2 and len(low["ways"]["pooled"]["error"]["levels"]) == len(levels) - 1
    both = ("", ", shared plans")
    assert list(low["ways"]) == [f"{way}{how}" for how in both for way in ("pooled", "sla, untrained")]

    more = tmp_path / "more"
    again = ("train", "--model", model, "--latents", latents, *HOW, "--out", more, "--from", out)
    assert run(*again, "--steps", 1)[0] == 0
    start = json.loads((more / "record-transformer.json").read_text())["velocity_error"]["before"]["overall"]
    assert start == pytest.approx(record["velocity_error"]["after"]["overall"], rel=1e-4)


def test_what_is_refused(run, model: Path, tmp_path: Path) -> None:
    code, _, err = run("train", "--model", model, "--latents", tmp_path, "--out", tmp_path / "o", "--steps", 1)
    assert code == 3 and "no latents in" in err
    code, _, err = run("latents", "--videos", tmp_path, "--count", 1, "--out", tmp_path / "o")
    assert code == 2 and "no videos in" in err
    code, _, err = run("train", "--latents", tmp_path, "--out", tmp_path / "o")
    assert code == 2 and "how long to train" in err
    code, _, err = run("latents", "--count", 1, "--out", tmp_path)
    assert code == 2 and "--prompts-file" in err  # argparse: one source is required
    code, _, err = run("latents", "--model", model, "--scenes", "rendered", "--size", "90x96", "--count", 1,
                       "--out", tmp_path / "o")  # fmt: skip
    assert code == 2 and "90" in err


def test_layers_are_scored_and_the_best_become_linear(run, model: Path, tmp_path: Path) -> None:
    latents, scores, out = tmp_path / "latents", tmp_path / "scores.json", tmp_path / "sla"
    made = ("latents", "--model", model, "--scenes", "rendered", *SIZE, "--count", 3, "--out", latents)
    assert run(*made)[0] == 0
    same = ("--model", model, "--latents", latents, "--device", "cpu")
    code, table, err = run("score", *same, "--count", 1, "--fit", 2, "--levels", 2, "--out", scores)
    assert code == 0 and f"record: {scores}" in err
    told = json.loads(scores.read_text())
    ranking = [each["layer"] for each in told["layers"]]
    rows = [line.split("│")[1:4] for line in table.splitlines() if line.startswith("│")]
    assert [int(row[0]) for row in rows] == ranking, "best first"
    assert told["fitted"] and told["samples"] == {"scored": 1, "fitted": 2} and told["chip"].startswith("CPU")
    assert len(told["layers"][0]["error"]["levels"]) == 2 and scores.with_suffix(".safetensors").exists()

    train = ("train", *same, *HOW, "--out", out, "--scores", scores)
    code, _, err = run(*train, "--steps", 4, "--linear-layers", "best:1", "--blend-steps", 2)
    assert code == 0, err
    record = json.loads((out / "record-transformer.json").read_text())
    assert record["options"]["sla"]["linear_layers"] == ranking[:1] and record["options"]["blend_steps"] == 2
    words = ("--sla", out / "transformer.safetensors", "--count", 1, "--out", tmp_path / "e.json")
    code, table, err = run("evaluate", *same, *words)
    assert code == 0 and "linear layers" in table, err
    way = json.loads((tmp_path / "e.json").read_text())["ways"]["sla, trained"]
    assert list(way["report"]["linear_calls_per_layer"]) == [str(ranking[0])]

    # fitted projections are what training starts from; a layer may be named, and one left dense
    dense = ("--dense-layers", ranking[1], "--linear-layers", ranking[0], "--steps", 1)
    starts = []
    for name, more in (("fitted", ("--scores", scores)), ("plain", ())):
        there = tmp_path / name
        code, _, err = run("train", *same, *HOW, "--out", there, *dense, *more)
        assert code == 0, err
        starts.append(json.loads((there / "record-transformer.json").read_text())["velocity_error"]["before"])
    assert starts[0] != starts[1]
    code, table, err = run("evaluate", *same, "--sla", tmp_path / "fitted", "--count", 1)
    assert code == 0 and "linear layers" in table and " - " in table, err  # nothing sparse is left

    for more, told in (
        (("--linear-layers", "best:1"), "give --scores"),
        (("--scores", scores), "--scores is for linear layers"),
        (("--scores", scores, "--linear-layers", "best:3"), "best:3 is not possible: 1 to 2"),
        (("--scores", scores, "--linear-layers", "0", "--from", out), "give one of them"),
        (("--scores", scores, "--linear-layers", "0", "--expert", "transformer_2"), "is of transformer, and"),
        (("--scores", scores, "--linear-layers", "0", "--feature", "relu"), "trained with feature 'softmax'"),
        (("--linear-layers", "0", "--dense-layers", "0"), "both name layer 0"),
        (("--linear-layers", "best:x"), "'best:x': give numbers of layers, 0,3,5, or best:N"),
    ):
        code, _, err = run("train", *same, *HOW, "--out", tmp_path / "o", "--steps", 1, *more)
        assert code == 2 and told in err, err
    code, _, err = run("score", *same, "--out", tmp_path / "scores")
    assert code == 2 and "must end in .json" in err


def test_two_experts_share_latents_and_a_folder(run, model: Path, wan22_folder: Path, tmp_path: Path) -> None:
    import dit_accel
    from dit_accel.pipelines import wan
    from dit_accel.training.samples import LatentFolder

    samples, out = tmp_path / "l", tmp_path / "sla"
    made = ("latents", "--model", wan22_folder, "--scenes", "denoised", "--dtype", "float32", *SIZE)
    assert run(*made, "--count", 2, "--out", samples)[0] == 0
    index = LatentFolder(samples).index
    parts = [index.part(role).timesteps for role in ("transformer", "transformer_2")]
    assert parts[0] + parts[1] == index.schedule.timesteps and min(parts[0]) >= 875 > max(parts[1])
    for role in ("transformer", "transformer_2"):
        train = ("train", "--model", wan22_folder, "--latents", samples, *HOW, "--expert", role, "--out", out)
        code, told, err = run(*train, "--steps", 1)
        assert code == 0 and told.strip() == str(out / f"{role}.safetensors"), err
        record = json.loads((out / f"record-{role}.json").read_text())
        levels = [level["sigma"] * 1000 for level in record["velocity_error"]["before"]["levels"]]
        assert all((level >= 875) == (role == "transformer") for level in levels)
    words = ("evaluate", "--model", wan22_folder, "--latents", samples, "--sla", out, "--count", 1)
    code, table, err = run(*words, "--expert", "transformer_2", "--device", "cpu")
    assert code == 0 and "sla, trained" in table, err
    pipe = wan.load(wan22_folder, device="cpu")
    with dit_accel.accelerate(pipe, method="sla", weights=str(out)):
        pass
    code, _, err = run("train", "--model", model, "--latents", samples, *HOW, "--expert", "transformer_2",
                       "--out", tmp_path / "o", "--steps", 1)  # fmt: skip
    assert code == 2 and "has no transformer_2" in err


def test_an_interrupt_leaves_a_checkpoint_and_exits_130(run, model: Path, tmp_path: Path) -> None:
    latents, out = tmp_path / "latents", tmp_path / "sla"
    made = ("latents", "--model", model, "--scenes", "rendered", *SIZE, "--count", 2, "--out", latents)
    assert run(*made)[0] == 0
    words = ["train", "--model", model, "--latents", latents, *HOW, "--out", out, "--minutes", "5",
             "--save-minutes", "0.0001"]  # fmt: skip
    running = subprocess.Popen(
        [sys.executable, SCRIPTS / "finetune_sla.py", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    began = time.monotonic()
    while not (out / "checkpoint-transformer.safetensors").exists():
        assert running.poll() is None and time.monotonic() - began < 120, running.stderr.read()
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "go on with the same command and --resume" in err
    assert {path.name for path in out.iterdir()} == {"checkpoint-transformer.safetensors"}


def test_the_help_shows_how(run) -> None:
    for verb in ("latents", "score", "train", "evaluate"):
        code, told, _ = run(verb, "--help")
        assert code == 0 and "finetune_sla.py latents --scenes rendered" in told
