"""Forwards that several processes share, timed beside one: the same script, with two processes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_parallel.py"
ATTEMPTS = 3


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """The script's end. Where a signal ends a process, both begin again: see tests/parallel/test_ulysses.py."""
    for _ in range(ATTEMPTS):
        ended = run_once(*words)
        if "exitcode: -" not in ended.stderr:
            break
    return ended


def run_once(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=240, env=environment
    )


def test_two_processes_compute_what_one_does_and_both_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "parallel.json"
    ended = run("--tiny", "--rounds", 3, "--keeps", 0.5, "--cases", "wan-1.3b-480p", "--out", out)
    assert ended.returncode == 0, ended.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["environment"]["processes"] == 2 and record["environment"]["backend"] == "gloo"
    (case,) = record["cases"]
    assert case["problem"] is None and case["check"]["error"] <= case["check"]["limit"] < 1e-5
    assert set(case["variants"]) == {"dense", "keep 0.5"}
    for one in case["variants"].values():
        assert len(one["seconds_alone_each"]) == len(one["seconds_shared_each"]) == 3
        assert one["difference"] < 1e-5
        assert min(one["seconds_alone_each"]) <= one["seconds_alone"] <= max(one["seconds_alone_each"])
    dense, sparse = case["variants"]["dense"], case["variants"]["keep 0.5"]
    assert dense["times_as_fast_as_dense_alone"] == dense["times_as_fast_as_dense_shared"] == 1
    by_hand = sorted(a / b for a, b in zip(dense["seconds_alone_each"], sparse["seconds_shared_each"], strict=True))
    assert sparse["times_as_fast_as_dense_by_one"] == by_hand[1]
    assert "wan-1.3b-480p: grid 3x12x10" in ended.stdout and "keep 0.5" in ended.stdout


def test_a_case_that_does_not_exist_is_named() -> None:
    ended = run("--cases", "wan-2b")
    assert ended.returncode != 0 and "wan-2b" in ended.stderr and "wan-14b-720p" in ended.stderr


def test_it_says_how_it_is_started() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT), "--tiny"], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2 and "torchrun --nproc-per-node 2" in ended.stderr
    assert "Traceback" not in ended.stderr
