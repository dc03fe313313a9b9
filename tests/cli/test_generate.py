"""`dit-accel generate` in a process of its own, on random models in the real repositories' layout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dit_accel.pipelines.video import read_clip

SMALL = ("--size", "64x64", "--frames", "5", "--steps", "3", "--seed", "7")
SPARSE = ("--set", "block=16", "--set", "min_tokens=0", "--set", "dense_above=1.0")
FAST = ("generate", "--preset", "wan21-fast", *SMALL, *SPARSE)


@pytest.mark.parametrize("which", ["wan21_folder", "wan22_folder"])
def test_end_to_end(which: str, cli: Callable, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    done = cli(*FAST, "--model", model, "--prompt", "a red star", "-o", "clip.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clip.mp4\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "run.json"]

    frames, fps, comment = read_clip(tmp_path / "clip.mp4")
    assert frames.shape == (5, 64, 64, 3) and fps == 16
    inside = json.loads(comment)
    assert inside["prompt"] == "a red star" and inside["seed"] == 7

    record = json.loads((tmp_path / "run.json").read_text())
    (clip,) = record["clips"]
    calls = clip["report"]["self_attention_calls"]
    # 3 steps x 2 branches x 4 layers, of which the preset keeps the first two dense.
    assert calls == {"sparse": 12, "linear": 0, "dense": 12}
    assert clip["report"]["dense_reasons"] == {"dense layer": 12} and clip["report"]["fallbacks"] == {}
    assert 0 < clip["report"]["keep"]["achieved"] < 1
    assert record["preset"]["sources"]["sparse.block"] == "cli"
    assert record["preset"]["sources"]["sparse.dense_layers"] == "preset wan21-fast"
    assert record["versions"]["torch"] and record["machine"]["device"] == "cpu"
    assert clip["seconds"] > 0 and record["timings"]["load_seconds"] > 0
    last = done.stderr.strip().splitlines()[-1]
    assert "12 of 24 self-attention calls sparse" in last and "dense not measured" in last and " s" in last
    assert "provisional" in done.stderr and "seed 7" in done.stderr


def test_a_step_cache(cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    cache = ("--set", "cache.name=easy", "--set", "cache.schedule=1101", "--set", "cache.min_steps=0")
    done = cli(
        *FAST, "--steps", "4", *cache, "--model", wan21_folder, "--prompt", "x", "-o", "a.mp4", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    (clip,) = record["clips"]
    assert clip["report"]["forwards"] == {"computed": 6, "reused": 2}
    # 3 computed steps x 2 branches x 2 layers that are not dense
    assert clip["report"]["self_attention_calls"] == {"sparse": 12, "linear": 0, "dense": 12}
    assert record["preset"]["cache"]["name"] == "easy" and record["preset"]["sources"]["cache.schedule"] == "cli"
    assert "2 of 8 forwards reused (25%)" in done.stderr


def test_compare_dense_and_json(cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    done = cli(
        *FAST, "--model", wan21_folder, "--prompt", "x", "-o", "a.gif", "--compare-dense", "--json", "--strict",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "run.json").read_text())
    (clip,) = record["clips"]
    assert clip["dense"]["time_ratio"] == pytest.approx(clip["dense"]["seconds"] / clip["seconds"], abs=0.01)
    assert 5 < clip["dense"]["psnr_db"] < 80
    assert "s dense (" in done.stderr and "PSNR" in done.stderr
    fast, dense = (read_clip(tmp_path / name)[0] for name in ("a.gif", "a-dense.gif"))
    assert fast.shape == dense.shape == (5, 64, 64, 3) and not np.array_equal(fast, dense)


def test_the_dense_twin_is_the_dense_preset(cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    model = ("--model", wan21_folder, "--prompt", "x")
    assert cli(*FAST, *model, "-o", "a.png", "--compare-dense", cwd=tmp_path).returncode == 0
    assert (
        cli("generate", "--preset", "wan21-dense", *SMALL, *model, "-o", "b.png", cwd=tmp_path).returncode
        == 0
    )
    for n in range(1, 6):
        twin, dense = (read_clip(tmp_path / f"{name}-{n:04d}.png")[0] for name in ("a-dense", "b"))
        assert np.array_equal(twin, dense)


def test_a_list_of_prompts(cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\na red star\n\na blue circle\n")
    done = cli(
        *FAST, "--model", wan21_folder, "--prompts-file", "prompts.txt", "-o", "out/", "--no-metadata", "-q",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    files = [Path(line) for line in done.stdout.split()]
    assert [file.name for file in files] == ["wan21-fast-7-0001.mp4", "wan21-fast-7-0002.mp4"]
    assert [read_clip(tmp_path / file)[2] for file in files] == [None, None]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [clip["prompt"] for clip in record["clips"]] == ["a red star", "a blue circle"]
    # One handle a clip: the second report does not count the first clip's calls.
    assert [clip["report"]["self_attention_calls"]["sparse"] for clip in record["clips"]] == [12, 12]

    alone = cli(*FAST, "--model", wan21_folder, "--prompt", "a blue circle", "-o", "alone.mp4", cwd=tmp_path)
    assert alone.returncode == 0
    assert np.array_equal(read_clip(tmp_path / "alone.mp4")[0], read_clip(tmp_path / files[1])[0])


def test_without_a_seed_it_is_drawn_told_and_kept(cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    few = (
        "generate",
        "--preset",
        "wan21-dense",
        "--size",
        "32x32",
        "--frames",
        "1",
        "--steps",
        "1",
        "--prompt",
        "x",
    )
    done = cli(*few, "--model", wan21_folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    seed = json.loads((folder / "run.json").read_text())["seed"]
    assert f"seed {seed}" in done.stderr and folder.name == f"wan21-dense-{seed}"
    assert done.stdout.strip() == str(Path("outputs") / folder.name / f"wan21-dense-{seed}-0001.mp4")
    assert read_clip(tmp_path / done.stdout.strip())[0].shape == (1, 32, 32, 3)


def test_strict_forbids_a_fall_back(
    cli_environment: dict[str, str], wan21_folder: Path, tmp_path: Path
) -> None:
    """Another plugin takes one attention over in mid-run, which sparse attention can only notice."""
    code = (
        "import sys\n"
        "from diffusers.models.transformers.transformer_wan import WanAttnProcessor\n"
        "from dit_accel.cli.app import run\n"
        "from dit_accel.pipelines import wan\n"
        "load = wan.load\n"
        "def load_with_a_rival(*a, **k):\n"
        "    pipe = load(*a, **k)\n"
        "    take = lambda module, *_: module.blocks[3].attn1.set_processor(WanAttnProcessor())\n"
        "    pipe.transformer.register_forward_hook(take)\n"
        "    return pipe\n"
        "wan.load = load_with_a_rival\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    arguments = [*FAST, "--model", wan21_folder, "--prompt", "x", "-o", "new/a.mp4"]
    for strict, expected in (["--strict"], 4), ([], 0):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments, *strict],
            cwd=tmp_path,
            env=cli_environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        last = done.stderr.splitlines()[-1]
        assert done.returncode == expected, done.stderr
        if strict:
            assert last.startswith("error: ") and "processor was replaced" in last
            assert not list(tmp_path.iterdir())
        else:
            assert "fall-backs." in last and "no fall-backs" not in last


def test_a_named_executor_runs_or_fails(cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    """An executor asked for by name that cannot run here must not be replaced in silence."""
    done = cli(
        *FAST, "--model", wan21_folder, "--prompt", "x", "-o", "new/a.mp4", "--set", "impl=triton", "--strict",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3 and done.stderr.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_ones_own_preset(cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        f'[mine]\nextends = "wan21-fast"\nmodel = "{wan21_folder}"\n'
        "[mine.generate]\nwidth = 32\nheight = 32\nframes = 1\nsteps = 1\n"
        "[mine.sparse]\nblock = 8\nmin_tokens = 0\ndense_above = 1.0\ndense_layers = []\n"
    )
    done = cli("generate", "--preset", "my.toml", "--prompt", "x", "-o", "a.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "provisional" in done.stderr
    report = json.loads((tmp_path / "run.json").read_text())["clips"][0]["report"]
    assert report["self_attention_calls"]["dense"] == 0


def test_a_terminal_gets_a_bar_and_colours_unless_refused(
    terminal: Callable, wan21_folder: Path, tmp_path: Path
) -> None:
    few = ("--size", "32x32", "--frames", "1", "--steps", "2", "--prompt", "x", "--seed", "1", "-o", "a.mp4")
    code, shown = terminal("generate", "--preset", "wan21-dense", "--model", wan21_folder, *few, cwd=tmp_path)
    assert code == 0 and "/2 [" in shown
    code, shown = terminal("generate", cwd=tmp_path, colours=True)
    assert code == 2 and "\x1b[" in shown
    code, shown = terminal("generate", cwd=tmp_path)
    assert code == 2 and "\x1b[" not in shown and "error: give either" in shown
