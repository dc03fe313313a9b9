"""Help, dry runs, presets and doctor: what needs no weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dit_accel
from dit_accel.options import IMPLS


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("generate", "--help"),
        ("inspect", "--help"),
        ("generate", "--prompt", "x", "--dry-run"),
        ("presets", "list"),
        ("presets", "show", "wan21-fast"),
        ("--version",),
    ],
    ids=" ".join,
)
def test_torch_is_not_imported(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys; from dit_accel.cli.app import run; code = run(sys.argv[1:]); "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_tells_the_exit_codes_and_every_option(cli: Callable, tmp_path: Path) -> None:
    began = time.monotonic()
    told = cli("generate", "--help", cwd=tmp_path, COLUMNS="200").stdout
    assert time.monotonic() - began < 15  # a fraction of a second on a machine that does nothing else
    assert "130 interrupted" in told
    for option in (
        "--preset --prompt --prompts-file --negative-prompt --image --count --model --size --frames --steps --guidance "
        "--seed --device --dtype --offload --fps --lora --set --dry-run --compare-dense --strict --json --no-metadata "
        "--quiet --verbose --output"
    ).split():
        assert option in told
    assert cli(cwd=tmp_path).returncode == 2
    assert cli("--version", cwd=tmp_path).stdout == f"dit-accel {dit_accel.__version__}\n"


def test_dry_run_shows_every_value_and_its_source(cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    flags = (
        "--preset",
        "wan21-balanced",
        "--model",
        str(wan21_folder),
        "--steps",
        "9",
        "--set",
        "sparse.keep=0.3",
    )
    done = cli("generate", *flags, "--prompt", "a [bold] star", "--dry-run", cwd=tmp_path, COLUMNS="160")
    assert done.returncode == 0 and done.stderr == ""
    rows = dict(re.findall(r"│ (\S+) +│ (.*?) *│", done.stdout))
    sources = dict(re.findall(r"│ (\S+) +│ .* │ (\S.*?) +│", done.stdout))
    assert rows["generate.steps"] == "9" and sources["generate.steps"] == "cli"
    assert rows["sparse.keep"] == "0.3" and sources["sparse.keep"] == "cli"
    assert rows["sparse.dense_above"] == "0.952" and sources["sparse.dense_above"] == "preset wan21-balanced"
    assert sources["generate.frames"] == "preset wan21-dense" and sources["sparse.block"] == "default"
    assert rows["prompt"] == "a [bold] star" and sources["seed"] == "random"
    assert not list(tmp_path.iterdir())


def test_dry_run_needs_no_weights_and_says_so(cli: Callable, tmp_path: Path) -> None:
    done = cli("generate", "--preset", "wan21-fast", "--prompt", "x", "--dry-run", "--json", cwd=tmp_path)
    assert (
        done.returncode == 0
        and "note: Wan-AI/Wan2.1-T2V-14B-Diffusers is not in the local cache" in done.stderr
    )
    told = json.loads(done.stdout)
    assert told["model_folder"] is None and told["preset"]["generate"]["frames"] == 81


def test_dry_run_checks_sizes_where_it_can(cli: Callable, wan21_folder: Path, tmp_path: Path) -> None:
    done = cli(
        "generate", "--model", wan21_folder, "--size", "70x64", "--prompt", "x", "--dry-run", cwd=tmp_path
    )
    assert done.returncode == 2 and "nearest is 64x64" in done.stderr


def test_presets(cli: Callable, tmp_path: Path) -> None:
    listed = json.loads(cli("presets", "list", "--json", cwd=tmp_path).stdout)
    assert {"tiny-wan", "tiny-wan-fast", "wan21-fast", "wan21-balanced"} <= {
        preset["name"] for preset in listed
    }
    table = cli("presets", "list", cwd=tmp_path, COLUMNS="240").stdout
    assert all(preset["name"] in table and preset["description"] in table for preset in listed)
    shown = cli("presets", "show", "wan21-fast", cwd=tmp_path).stdout
    assert "provisional" in shown and "sparse.keep" in shown and "preset wan21-dense" in shown
    told = json.loads(cli("presets", "show", "wan21-fast", "--json", cwd=tmp_path).stdout)
    assert told["sparse"]["keep"] == 0.25 and told["sources"]["generate.width"] == "preset wan21-dense"
    wrong = cli("presets", "show", "wan21-fas", cwd=tmp_path)
    assert wrong.returncode == 2 and "Did you mean 'wan21-fast'" in wrong.stderr


def test_doctor(cli: Callable, tmp_path: Path) -> None:
    began = time.monotonic()
    done = cli("doctor", "--json", cwd=tmp_path)
    seconds = time.monotonic() - began
    told = json.loads(done.stdout)
    checks = {check["name"]: check for check in told["checks"]}
    assert done.returncode == 0 and told["sound"]
    assert sys.executable in checks["python"]["detail"]
    elsewhere = {"triton", "hopper", "flash4", "flex"}
    for impl in set(IMPLS) - {"auto"} - elsewhere:
        assert checks[f"block_sparse/{impl}"]["status"] == "ok"
    for kernel in ("pooling", "selection", "counting"):
        assert checks[f"{kernel}/reference"]["status"] == "ok"
    for kernel in ("block_sparse", "pooling", "selection", "counting"):
        assert checks[f"{kernel}/triton"]["status"] in ("ok", "absent")
    for impl in elsewhere:
        assert checks[f"block_sparse/{impl}"]["status"] in ("ok", "absent")
    assert {"torch", "diffusers", "triton"} <= set(checks)
    assert seconds < 20, "the verb is to take 10 s on a machine that does nothing else"


def test_doctor_finds_a_broken_kernel(tmp_path: Path) -> None:
    """An executor that is wrong by a tenth, put in place of the fast one, is found and told by its name."""
    code = (
        "import sys, dit_accel.kernels.block_sparse as kernels, dit_accel.cli.doctor as doctor\n"
        "right = kernels.block_sparse\n"
        "def wrong(*a, impl, **k):\n"
        "    out, lse = right(*a, impl=impl, **k)\n"
        "    return (out * 1.1, lse) if impl == 'cpu' else (out, lse)\n"
        "kernels.block_sparse = wrong\n"
        "from dit_accel.cli.app import run\n"
        "sys.exit(run(['doctor']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1 and "1 broken: block_sparse/cpu" in done.stdout
