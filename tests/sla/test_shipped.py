"""The weights that ship: they are found by name, small, and nearer to dense than without training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.presets import FOLDER, model_path, shipped_models, shipped_weights
from dit_accel.sla.spec import file_for, read_spec

NAME = "tiny-wan-sla"


def test_they_are_found_by_name_whatever_lies_around(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert shipped_weights() == (NAME,) and NAME not in shipped_models()
    assert file_for(NAME, "transformer") == FOLDER / "models" / NAME / "transformer.safetensors"
    assert file_for(f"./{NAME}", "transformer") == tmp_path.joinpath(NAME, "transformer.safetensors").relative_to(
        tmp_path
    )
    spec = read_spec(NAME)
    assert (spec.keep, spec.order, spec.block, spec.transformer) == (0.1, "packed", 32, "WanTransformer3DModel")


def test_the_preset_runs_them_and_they_do_good(one_thread: None) -> None:
    """At a small size, far from what they were trained at: the steps of a dense run, asked again with and without."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(model_path("tiny-wan"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    asked: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: asked.append(k), with_kwargs=True)
    size = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 5}
    pipe("a red star moving left", generator=torch.Generator().manual_seed(1), output_type="latent", **size)
    hook.remove()
    sparse = [given for given in asked if float(given["timestep"].max()) <= 960]  # they were trained below
    assert 4 <= len(sparse) < len(asked)

    @torch.no_grad()
    def velocities() -> torch.Tensor:
        return torch.stack([pipe.transformer(**given)[0] for given in sparse])

    dense = velocities()

    def error(**options: Any) -> float:
        with dit_accel.accelerate(pipe, NAME, min_tokens=0, dense_above=0.96, **options) as handle:
            found = velocities()
        assert handle.report().sparse_calls == 8 * len(sparse)
        return float((found - dense).square().sum() / dense.square().sum())

    untrained = error(weights=None, order="packed", block=32)
    assert error() < 0.7 * untrained


def test_they_may_be_named_on_the_command_line(tmp_path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    from dit_accel.cli.app import run

    monkeypatch.chdir(tmp_path)
    words = ["generate", "--preset", "tiny-wan", "--sla", NAME, "--prompt", "a red star", "--dry-run", "--json"]
    assert run(words) == 0 and NAME in capsys.readouterr().out
    assert run([*words[:4], "tiny-wan-slo", *words[5:]]) == 3
    assert "cannot read tiny-wan-slo" in capsys.readouterr().err
