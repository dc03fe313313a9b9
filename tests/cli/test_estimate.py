"""`dit-accel estimate`: figures without weights, without a GPU and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def told(cli: Callable, folder: Path, *arguments: str) -> dict[str, Any]:
    done = cli("estimate", "--json", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_needs_no_torch_and_about_a_second(tmp_path: Path) -> None:
    code = (
        "import sys; from dit_accel.cli.app import run; code = run(sys.argv[1:]); "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    began = time.monotonic()
    command = [sys.executable, "-P", "-c", code, "estimate", "--preset", "wan21-fast"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 15  # half a second on a machine that does nothing else
    assert "75,600 (21 x 45 x 80)" in done.stdout and "rates measured" in done.stdout and "break-even" in done.stdout
    assert "not estimated: text encoders and autoencoder" in done.stderr


def test_sizes_steps_and_settings_change_what_is_told(cli: Callable, tmp_path: Path) -> None:
    whole = told(cli, tmp_path, "--preset", "wan21-fast")
    small = told(cli, tmp_path, "--preset", "wan21-fast", "--size", "832x480", "--steps", "20")
    assert small["tokens"] == 21 * 30 * 52 and small["steps"] == 20
    assert small["dense_seconds"] < 0.2 * whole["dense_seconds"]
    more = told(cli, tmp_path, "--preset", "wan21-fast", "--set", "sparse.keep=0.5")
    assert more["gain"] < whole["gain"] and more["keep"] == pytest.approx(0.5, abs=0.01)
    assert whole["memory"]["total"] == sum(size for name, size in whole["memory"].items() if name != "total")
    alone = told(cli, tmp_path, "--preset", "wan21-fast", "--guidance", "1")
    assert alone["dense_seconds"] == pytest.approx(whole["dense_seconds"] / 2)


def test_a_dense_preset_gains_nothing(cli: Callable, tmp_path: Path) -> None:
    dense = told(cli, tmp_path, "--preset", "wan21-dense")
    assert dense["gain"] == pytest.approx(1) and dense["fast"] is None and dense["keep"] is None


def test_other_gpus_are_scaled_and_say_so(cli: Callable, tmp_path: Path) -> None:
    h200 = told(cli, tmp_path, "--preset", "wan21-fast")
    other = told(cli, tmp_path, "--preset", "wan21-fast", "--gpu", "a100")
    assert h200["gpu"]["rates"] == "measured" and other["gpu"]["rates"] == "scaled, not measured"
    assert 2 < other["dense_seconds"] / h200["dense_seconds"] < 4
    same = ("--tflops", "312", "--bandwidth", "2039", "--memory", "80")
    own = told(cli, tmp_path, "--preset", "wan21-fast", *same)
    assert own["dense_seconds"] == pytest.approx(other["dense_seconds"], rel=0.1)
    printed = cli("estimate", "--preset", "wan21-fast", "--gpu", "a100", cwd=tmp_path, COLUMNS="160")
    assert "scaled, not measured" in printed.stdout and "not measured" in printed.stderr


def test_what_does_not_fit_is_told_with_a_way_out(cli: Callable, tmp_path: Path) -> None:
    done = cli("estimate", "--preset", "wan22-fast", "--gpu", "rtx4090", cwd=tmp_path, COLUMNS="160")
    assert done.returncode == 0
    assert "DOES NOT FIT" in done.stdout and "--offload" in done.stdout
    assert told(cli, tmp_path, "--preset", "wan22-fast", "--gpu", "rtx4090")["fits"] is False


def test_a_caches_part_is_what_was_given(cli: Callable, tmp_path: Path) -> None:
    none = told(cli, tmp_path, "--preset", "wan21-turbo")
    assert none["cache_gain"] == 1 and any("--reused" in note for note in none["notes"])
    some = told(cli, tmp_path, "--preset", "wan21-turbo", "--reused", "20")
    assert some["fast_seconds"] == pytest.approx(none["fast_seconds"] - 20 * none["reused_step_seconds"])
    assert some["gain"] == pytest.approx(some["sparse_gain"] * some["region_gain"] * some["cache_gain"])
    plan = "1" * 30 + "10" * 10
    planned = told(cli, tmp_path, "--preset", "wan21-turbo", "--set", f'cache.schedule="{plan}"')
    assert planned["reused_steps"] == 10


def test_region_samplings_part_is_told(cli: Callable, tmp_path: Path) -> None:
    fast = told(cli, tmp_path, "--preset", "wan21-1.3b-fast", "--steps", "30")
    region = told(
        cli, tmp_path, "--preset", "wan21-1.3b-fast", "--steps", "30", "--set", "region.sample_ratio=0.5",
        "--set", "region.unit=block",
    )  # fmt: skip
    assert region["sparse_gain"] == pytest.approx(fast["gain"]) and region["region_gain"] > 1.3
    assert region["region_steps"] == 23 and region["memory"]["region"] > 1e9


def test_few_tokens_are_told_not_to_pay(cli: Callable, tmp_path: Path) -> None:
    small = told(cli, tmp_path, "--preset", "flux-fast")
    assert small["tokens"] < small["break_even_tokens"] < 16384
    large = told(cli, tmp_path, "--preset", "wan21-fast")
    assert 0 < large["break_even_tokens"] < large["tokens"]


def test_no_sparse_step_is_explained(cli: Callable, tmp_path: Path) -> None:
    few = told(cli, tmp_path, "--preset", "tiny-wan-fast")
    assert few["sparse_steps"] == 0 and any("fewer than its min_tokens" in note for note in few["notes"])
    noisy = told(cli, tmp_path, "--preset", "flux-fast", "--size", "4096x4096", "--set", "dense_above=0.96")
    assert noisy["sparse_steps"] == 0 and any("noise level" in note for note in noisy["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "wan21-fst"), "Did you mean"),
        (("--preset", "wan21-fast", "--gpu", "voodoo2"), "there are h200, h100"),
        (("--preset", "wan21-fast", "--tflops", "100"), "--bandwidth is missing"),
        (("--preset", "wan21-fast", "--tflops", "1", "--bandwidth", "1", "--memory", "1", "--gpu", "h100"), "one or"),
        (("--preset", "wan21-fast", "--tflops", "-1", "--bandwidth", "1", "--memory", "1"), "above 0"),
        (("--preset", "wan21-fast", "--size", "833x480"), "the nearest is 832x480"),
        (("--preset", "wan21-fast", "--dtype", "float32"), "bfloat16"),
        (("--preset", "wan21-fast", "--model", "somebody/else"), "give a local folder"),
        (("--preset", "wan21-fast", "--reused", "3"), "has no cache"),
        (("--preset", "wan21-turbo", "--reused", "46"), "makes up 0 to 45"),
        (("--preset", "tiny-wan-radial"), "--keep 0.3"),
        (("--preset", "tiny-wan-radial", "--keep", "2"), "up to 1"),
    ],
    ids=lambda value: " ".join(value[2:4]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(cli: Callable, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = cli("estimate", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_share_that_no_method_says_can_be_given(cli: Callable, tmp_path: Path) -> None:
    found = told(
        cli, tmp_path, "--preset", "tiny-wan-radial", "--keep", "0.3", "--set", "sparse.min_tokens=0", "--model",
        "tiny-wan",
    )  # fmt: skip
    assert 0.25 < found["keep"] < 0.35
