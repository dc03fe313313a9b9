"""A clip that is not finite, memory that runs out, a disk that is full: how `generate` ends, and what it leaves."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dit_accel.caches.memory import Memory
from dit_accel.cli.app import run
from dit_accel.guards import OUT_OF_MEMORY
from dit_accel.kernels import block_sparse as kernels
from dit_accel.pipelines import wan
from dit_accel.pipelines.video import read_clip
from dit_accel.region.engine import RegionEngine

SMALL = ("--size", "64x64", "--frames", "5", "--steps", "3", "--seed", "7", "--prompt", "a red star")
SPARSE = ("--set", "block=16", "--set", "min_tokens=0", "--set", "dense_above=1.0")
CALLS = 12  # sparse ones: 3 steps, 2 branches, 2 layers that are not dense
MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.6 GiB of which ..."


@pytest.fixture
def generate(
    wan21_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Iterator[Callable[..., int]]:
    """`dit-accel generate` in this process; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    log = diffusers.utils.logging
    before = log.get_verbosity()

    def generate(*arguments: str, preset: str = "wan21-fast") -> int:
        sparse = SPARSE if preset == "wan21-fast" else ()
        return run(["generate", "--preset", preset, *SMALL, *sparse, "--model", str(wan21_folder), *arguments])

    yield generate
    log.set_verbosity(before)
    log.enable_progress_bar()


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, fault: float | Exception, times: int = 10**6) -> None:
    """Have the executor's result be wrong from some call on: the fifth is not a first call any more."""
    execute, calls = kernels.block_sparse, [0]

    def wrong(*args: Any, **known: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = execute(*args, **known)
        calls[0] += 1
        if first <= calls[0] < first + times:
            if isinstance(fault, Exception):
                raise fault
            out[..., 0, 0] = fault
        return out, lse

    monkeypatch.setattr(kernels, "block_sparse", wrong)


def record(path: Path = Path("run.json")) -> dict[str, Any]:
    (clip,) = json.loads(path.read_text())["clips"]
    return clip


def frames(name: str) -> np.ndarray:
    return read_clip(Path(name))[0]


@pytest.mark.parametrize("fault", [math.nan, math.inf], ids=["nan", "infinity"])
def test_a_clip_that_is_not_finite_is_made_again_dense(generate, monkeypatch, capsys, fault):
    assert generate("-o", "dense.gif", preset="wan21-dense") == 0
    capsys.readouterr()
    spoil(monkeypatch, 5, fault)
    assert generate("-o", "a.gif", "--compare-dense") == 0
    told = capsys.readouterr()
    assert "WARNING: the clip was not finite and was made again without anything of dit_accel" in told.err
    last = told.err.splitlines()[-1]
    assert "dense, after" in last and "made again" in last and "sparse" not in last and told.out == "a.gif\n"
    assert np.array_equal(frames("a.gif"), frames("dense.gif")) and not Path("a-dense.gif").exists()
    clip = record()
    (reason,) = clip["report"]["guards"]
    assert clip["retry"]["reason"] == reason and clip["retry"]["seconds"] > 0 and "dense" not in clip
    assert clip["report"]["self_attention_calls"]["sparse"] == CALLS  # what was tried, in vain


def test_under_strict_it_ends_the_run(generate, monkeypatch, capsys):
    spoil(monkeypatch, 5, math.nan)
    assert generate("-o", "new/a.gif", "--strict") == 4
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: strict=True, and the clip would be made again") and "not finite" in line
    assert not list(Path().iterdir())


def test_a_model_that_is_at_fault_is_told_from_us(generate, monkeypatch, capsys):
    load = wan.load

    def load_poisoned(*args: Any, **known: Any) -> Any:
        pipe = load(*args, **known)
        pipe.transformer.blocks[1].ffn.net[2].bias.data[0] = math.nan
        return pipe

    monkeypatch.setattr(wan, "load", load_poisoned)
    assert generate("-o", "a.gif") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "the model or its input is at fault" in line
    assert generate("-o", "a.gif", preset="wan21-dense") == 1
    assert "try --dtype" in capsys.readouterr().err.splitlines()[-1] and not list(Path().iterdir())


def test_what_a_first_call_finds_needs_no_second_run(generate, monkeypatch, capsys):
    spoil(monkeypatch, 1, torch.OutOfMemoryError(MEMORY), times=1)
    assert generate("-o", "a.gif") == 0
    clip = record()
    assert "retry" not in clip and clip["report"]["fallbacks"] == {OUT_OF_MEMORY: CALLS // 2}
    assert "6 fall-backs" in capsys.readouterr().err


EASY = ("--set", "cache.name=easy", "--set", "cache.schedule=101", "--set", "cache.min_steps=0")
REGION = ("--steps", "5", "--set", "region.sample_ratio=0.5", "--set", "region.start=1", "--set", "region.bucket=4")


@pytest.mark.parametrize("what", ["cache", "region", "the model"])
def test_memory_that_runs_out_elsewhere_ends_the_run(generate, monkeypatch, capsys, what):
    """In one line that names what our parts want; and the next run in the same process is as fresh."""
    more = {"cache": EASY, "region": REGION, "the model": ()}[what]
    assert generate("-o", "fresh.gif", *more) == 0
    before = sorted(Path().iterdir())

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(MEMORY)

    with monkeypatch.context() as patch:
        if what == "the model":
            patch.setattr(diffusers.models.transformers.transformer_wan.WanTransformerBlock, "forward", run_out)
        else:
            patch.setattr(*{"cache": (Memory, "put"), "region": (RegionEngine, "store")}[what], run_out)
        capsys.readouterr()
        assert generate("-o", "new/a.gif", *more) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: CUDA out of memory. Tried to allocate 20.00 GiB. ") and "--offload model" in line
    if what == "cache":
        assert "GiB by step cache 'easy' of transformer, for each branch" in line and "cache.store_device=cpu" in line
    if what == "region":
        assert "GiB by region sampling of transformer, for each branch" in line and "region.keys=drop" in line
    assert sorted(Path().iterdir()) == before
    assert generate("-o", "again.gif", *more) == 0
    assert np.array_equal(frames("again.gif"), frames("fresh.gif"))


DISK = """
import resource, sys
from dit_accel.cli.app import run
for limit, name in (200, "a.mp4"), (200, "a.gif"), (200, "a.png"), (5000, "record.png"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    own = ["--size", "16x16", "--frames", "1", "--no-metadata"] if name == "record.png" else []
    print(run([*sys.argv[1:], *own, "-o", f"kept/new/er/{name}"]), flush=True)
"""
KEYBOARD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from dit_accel.cli.app import run
from dit_accel.pipelines import video
signal.signal(signal.SIGINT, signal.default_int_handler)

class Pressed(np.ndarray):
    # Ctrl-C comes as the encoder asks for its third frame, in mid-file
    def __iter__(self):
        for number, frame in enumerate(np.asarray(self)):
            if number == 2:
                assert Path("kept/new/er").is_dir()
                os.kill(os.getpid(), signal.SIGINT)
            yield frame

stage = video.stage_clip
import dit_accel.cli.run as working
working.stage_clip = lambda at, path, frames, fps, comment=None: stage(at, path, frames.view(Pressed), fps, comment)
for name in "a.mp4", "a.gif", "a.png":
    print(run([*sys.argv[1:], "-o", f"kept/new/er/{name}"]), flush=True)
"""


@pytest.mark.parametrize(
    ("code", "exits", "line"),
    [
        (DISK, "3333", "error: cannot write kept/new/er/"),
        (KEYBOARD, ["130"] * 3, "error: interrupted; nothing half-written was left"),
    ],
    ids=["full disk", "interrupt"],
)
def test_files_that_break_off(code, exits, line, cli_environment, wan21_folder, tmp_path):
    """A system that refuses larger files, and a real signal: every format, and the record; no file, no new folder."""
    (tmp_path / "kept").mkdir()
    own = ("generate", "--preset", "wan21-fast", "--model", wan21_folder)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *own, *SMALL, *SPARSE],
        cwd=tmp_path,
        env=cli_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == list(exits), done.stderr
    errors = [told for told in done.stderr.splitlines() if "rror" in told]
    assert len(errors) == len(exits) and all(told.startswith(line) for told in errors)
    assert "Traceback" not in done.stderr and (line.endswith("left") or "File too large" in errors[-1])
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
