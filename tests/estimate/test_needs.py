"""What caches and plans hold, against what the real parts declare in a run of the shipped models."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
from dit_accel import accelerate
from dit_accel.estimate import estimate
from dit_accel.pipelines import recipe
from dit_accel.preset import load_preset

FLOAT32_OVER_16_BIT = 2  # a CPU runs in float32


@pytest.mark.parametrize(
    ("name", "cache"), [("tiny-sd3-fast", "first_block"), ("tiny-wan-fast", "latent"), ("tiny-wan-fast", "tokens")]
)
def test_what_is_held_is_what_the_parts_declare(name: str, cache: str) -> None:
    frames = 9 if "wan" in name else 1
    preset = load_preset(name).with_values(
        {
            "generate.width": 64, "generate.height": 64, "generate.frames": frames, "generate.steps": 1,
            "sparse.min_tokens": 0, "sparse.dense_above": 1.0, "cache": {"name": cache},
        },
        "test",
    )  # fmt: skip
    pipe = recipe(preset.pipeline).load(preset.model, device="cpu", dtype="float32")
    with accelerate(pipe, preset) as handle:
        recipe(preset.pipeline).generate(pipe, preset.generate, "a ring", seed=1)
        needs = {what.split(" ")[0]: size for what, size in handle.needs().items()}
    told = estimate(preset)
    assert FLOAT32_OVER_16_BIT * told.memory.cache / told.forwards_a_step == pytest.approx(needs["step"], rel=0.01)
    assert told.memory.plans == pytest.approx(needs["sparse"], rel=0.2)
