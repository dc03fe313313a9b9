"""Bad input: one line on stderr, the documented exit code, nothing written, and quickly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROMPT = ("--prompt", "x")
CASES = {
    "unknown preset": (2, ["--preset", "tiny-wan-fst", *PROMPT], "Did you mean 'tiny-wan-fast'"),
    "unknown option": (2, ["--promt", "x"], "Did you mean --prompt"),
    "unknown setting": (2, [*PROMPT, "--set", "sparse.kep=0.5"], "Did you mean 'keep'"),
    "unknown bare setting": (2, [*PROMPT, "--set", "kep=0.5"], "Did you mean 'keep'"),
    "unknown method": (2, [*PROMPT, "--set", "method=poled"], "Did you mean 'pooled'"),
    "unknown executor": (2, [*PROMPT, "--set", "impl=tritn"], "Did you mean 'triton'"),
    "setting without value": (2, [*PROMPT, "--set", "keep"], "write key=value"),
    "value out of range": (2, [*PROMPT, "--set", "keep=7"], "keep"),
    "no prompt": (2, [], "give either --prompt TEXT or --prompts-file FILE"),
    "two prompts": (2, [*PROMPT, "--prompts-file", "x.txt"], "not both"),
    "prompts file missing": (2, ["--prompts-file", "none.txt"], "cannot read prompts file none.txt"),
    "prompts file empty": (2, ["--prompts-file", os.devnull], "holds no prompt"),
    "size that is none": (2, [*PROMPT, "--size", "big"], "write WIDTHxHEIGHT"),
    "frames that are none": (2, [*PROMPT, "--frames", "many"], "--frames"),
    "no steps": (2, [*PROMPT, "--steps", "0"], "at least 1"),
    "negative seed": (2, [*PROMPT, "--seed", "-1"], "seed -1"),
    "odd suffix": (2, [*PROMPT, "-o", "a.avi"], "Allowed: .gif, .mp4, .png"),
    "output nobody can write": (2, [*PROMPT, "-o", f"{os.devnull}/a.mp4"], "cannot write"),
    "strict on a dense preset": (2, ["--preset", "tiny-wan", *PROMPT, "--strict"], "nothing could fall back"),
    "comparing dense with dense": (2, ["--preset", "tiny-wan", *PROMPT, "--compare-dense"], "dense already"),
    "model folder missing": (3, [*PROMPT, "--model", "./none"], "no model at ./none"),
    "model not downloaded": (3, ["--preset", "wan21-fast", *PROMPT], "HF_HUB_OFFLINE forbids asking the hub"),
    "too many arguments": (2, [*PROMPT, "more"], "more"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, cli: Callable, tmp_path: Path) -> None:
    code, arguments, message = CASES[name]
    began = time.monotonic()
    done = cli("generate", *arguments, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == "" and not list(tmp_path.iterdir())
    assert time.monotonic() - began < 15  # loading torch and weights would take longer on the same machine


@pytest.fixture
def model(wan21_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan21_folder, tmp_path / "model"))


def bad(cli: Callable, tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Run it and see that it left one line and no file; returns exit code and line."""
    before = sorted(tmp_path.rglob("*"))
    done = cli(
        "generate",
        "--preset",
        "wan21-fast",
        *PROMPT,
        "--size",
        "64x64",
        "--frames",
        "5",
        *arguments,
        cwd=tmp_path,
    )
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert done.stdout == "" and sorted(tmp_path.rglob("*")) == before
    return done.returncode, done.stderr


def test_sizes_this_model_cannot_make(cli: Callable, model: Path, tmp_path: Path) -> None:
    code, line = bad(cli, tmp_path, "--model", "model", "--size", "70x64")
    assert code == 2 and "the nearest is 64x64" in line
    code, line = bad(cli, tmp_path, "--model", "model", "--frames", "6")
    assert code == 2 and "the nearest are 5 and 9" in line


def test_corrupt_weights(cli: Callable, model: Path, tmp_path: Path) -> None:
    shard = sorted((model / "transformer").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    code, line = bad(cli, tmp_path, "--model", "model")
    assert code == 3 and "corrupt weights" in line and shard.name in line


def test_pickled_weights(cli: Callable, model: Path, tmp_path: Path) -> None:
    """The file would run code if it were ever unpickled."""
    (file,) = (model / "vae").glob("*.safetensors")
    file.unlink()
    trap = b"cos\nsystem\n(S'touch trapped'\ntR."
    (model / "vae" / "diffusion_pytorch_model.bin").write_bytes(trap)
    code, line = bad(cli, tmp_path, "--model", "model")
    assert code == 3 and "only pickled weights" in line


def test_weights_that_do_not_belong(cli: Callable, model: Path, wan21_folder: Path, tmp_path: Path) -> None:
    """Whole safetensors files of another shape: only the loader can find out, and it is one line all the same."""
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | {"ffn_dim": 64}))
    done = cli(
        "generate", "--preset", "wan21-fast", *PROMPT, "--size", "64x64", "--frames", "5", "--seed", "1",
        "--model", "model", "-q", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 3 and "error: cannot load" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_another_family(cli: Callable, model: Path, tmp_path: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps(index | {"transformer": ["diffusers", "MochiTransformer3DModel"]})
    )
    code, line = bad(cli, tmp_path, "--model", "model")
    assert code == 2 and "MochiTransformer3DModel, of no family" in line


def test_somebody_elses_record_is_not_overwritten(cli: Callable, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"tool": "another"}')
    code, line = bad(cli, tmp_path, "--model", "model", "-o", "a.mp4")
    assert code == 2 and "run.json is not one of ours" in line


def test_diffusers_is_an_extra(cli_environment: dict[str, str], model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None; from dit_accel.cli.app import run; "
        "sys.exit(run(['generate', '--preset', 'wan21-fast', '--prompt', 'x', '--model', 'model', "
        "'--size', '64x64', '--frames', '5']))"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=cli_environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3 and "pip install 'dit-accel[diffusers]'" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "outputs").exists()


def test_a_traceback_comes_only_when_asked_for(cli: Callable, tmp_path: Path) -> None:
    assert "Traceback" in cli("generate", "--preset", "none", *PROMPT, "-v", cwd=tmp_path).stderr
