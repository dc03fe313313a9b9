"""A real bench of the shipped tiny-wan, as small as it goes: dense, a preset, dense again and fewer steps."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from dit_accel.bench.results import Results

PROMPTS = ("a red circle moving right over a blue background", "a <b>green</b> star & a \"square\"</script>")
STEPS, FRAMES, SIDE = 3, 5, 64


@pytest.fixture(scope="session")
def bench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report: results.json and the media that it names."""
    folder = tmp_path_factory.mktemp("bench")
    run_bench(folder)
    return folder


def run_bench(folder: Path) -> Results:
    from dit_accel.bench.measure import measure
    from dit_accel.bench.profile import profile
    from dit_accel.bench.results import Check, Clip, Environment
    from dit_accel.bench.session import Session, Subject
    from dit_accel.bench.store import Store
    from dit_accel.bench.workload import describe_workload
    from dit_accel.cli.versions import versions
    from dit_accel.pipelines import wan
    from dit_accel.preset import load_preset
    from dit_accel.presets import model_path

    size = {"generate.width": SIDE, "generate.height": SIDE, "generate.frames": FRAMES, "generate.steps": STEPS}
    # sparse in every step but the first, which is dense; the second is skipped
    sparse = {"sparse.min_tokens": 0, "sparse.block": 16, "sparse.dense_above": 0.97}
    cache = {"cache.name": "easy", "cache.schedule": "101", "cache.min_steps": 0}
    preset = load_preset("tiny-wan-fast").with_values(size | sparse | cache, "cli")
    pipe = wan.load(model_path("tiny-wan"))

    def generate(steps: int, clip: Clip):
        return wan.generate(pipe, replace(preset.generate, steps=steps), clip.prompt, seed=clip.seed)

    clips = tuple(Clip(prompt, seed) for seed, prompt in enumerate(PROMPTS, start=1))
    seen = profile(pipe, None, lambda: generate(1, clips[0]))
    workload = describe_workload(
        pipe, [preset], seen, 1, settings=("sparse.block=16",), weights="trained", makes="video", dtype="float32",
        device="cpu", offload="none", prompts=PROMPTS, seeds=(1, 2), image=None, rounds=2, fewer_steps="2",
    )  # fmt: skip
    checks = (Check("torch", "ok", "imports"),)
    environment = Environment("CPU", "Linux", versions(), None, None, None, None, checks, {"math": 0.5})
    results = Results(
        command="dit-accel bench --preset tiny-wan-fast", date="2026-11-29T01:00:00+00:00", complete=False,
        environment=environment, workload=workload, clips=clips, variants=(),
    )  # fmt: skip
    session = Session(
        pipe, generate, Store(folder, preset.generate.fps, ".mp4"), results, lambda _: contextlib.nullcontext(),
        "not run: lpips not installed", lambda *_: None,
    )  # fmt: skip
    # Whatever the clock says of the preset, so that the page of every run has all its parts.
    dense = Subject("dense", "dense", None, STEPS, (), "")
    session.measure_rounds([dense, Subject("dense, 2 steps", "fewer steps", None, 2, (), "", "tiny-wan-fast")], 2)
    return measure(session, [preset], {})
