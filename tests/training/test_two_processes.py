"""Two real processes (gloo): equal parameters on both, those of one process with the same rows; and the script so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
WORKER = """
import sys
sys.path.insert(0, sys.argv[3])
from test_two_processes import train
train(sys.argv[1], sys.argv[2], batch=1)
"""


def train(latents: Path | str, out: Path | str, batch: int) -> None:
    """Train a little; every process leaves its parameters in `out`."""
    from dit_accel.testing import tiny_wan_transformer
    from dit_accel.training.distill import Distiller, DistillOptions, make_accelerator
    from dit_accel.training.samples import LatentFolder
    from dit_accel.training.sla import SlaOptions
    from dit_accel.training.student import Student

    accelerator, out = make_accelerator("no", cpu=True), Path(out)
    sla = SlaOptions(keep=0.1, block=16, order="raster", mix=True)
    student = Student(tiny_wan_transformer(seed=1), sla, "lora", 2)
    how = DistillOptions(steps=3, batch=batch, rate=1e-3, projection_rate=1e-2, mix_rate=0.5, warmup=1)
    distiller = Distiller(student, LatentFolder(Path(latents)), how, accelerator, out)
    distiller.run({})
    held = {name: p.detach() for name, p in distiller.parameters.items()}
    save_file(held, out / f"rank-{accelerator.process_index}")
    # else the last to hold the process group would be the copy that averages gradients, whose end then hangs at times
    copy = weakref.ref(distiller.wrapped) if accelerator.num_processes > 1 else lambda: None
    distiller.end()
    assert copy() is None


def launch(*words: str | Path, cwd: Path) -> str:
    """Run a script in two processes; what it printed."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_both_processes_have_what_one_would(tiny_latents: Path, tmp_path: Path, one_thread) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    launch(worker, tiny_latents, tmp_path / "two", Path(__file__).parent, cwd=tmp_path)
    train(tiny_latents, tmp_path / "one", batch=2)
    first, second = (load_file(tmp_path / "two" / f"rank-{rank}") for rank in (0, 1))
    single = load_file(tmp_path / "one" / "rank-0")
    assert first.keys() == second.keys() == single.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, single[name], rtol=1e-2, atol=1e-3)
    two, one = (json.loads((tmp_path / name / "record-transformer.json").read_text()) for name in ("two", "one"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    for when in ("before", "after"):
        errors = [record["velocity_error"][when]["overall"] for record in (two, one)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    assert two["options"]["processes"] == 2


def test_the_script_runs_under_torchrun(tiny_latents: Path, tmp_path: Path) -> None:
    from dit_accel.testing import tiny_wan_pipeline

    tiny_wan_pipeline().save_pretrained(tmp_path / "model")
    script, out = ROOT / "scripts" / "finetune_sla.py", tmp_path / "sla"
    words = ["train", "--model", tmp_path / "model", "--latents", tiny_latents, "--out", out, "--steps", "2"]
    words += ["--minutes", "9"]  # the processes share a clock
    words += ["--block", "16", "--held-out", "1", "--precision", "bf16", "--checkpointing", "--device", "cpu"]
    told = launch(script, *words, cwd=tmp_path)
    assert told.split() == [str(out / "transformer.safetensors")]
    record = json.loads((out / "record-transformer.json").read_text())
    assert record["steps"] == 2 and record["options"]["processes"] == 2 and record["command"].endswith("cpu")
