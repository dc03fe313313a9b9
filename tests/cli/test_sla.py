"""`generate --sla`: trained weights run, their file says what they are for, and bad ones are one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = ("--preset", "wan21-fast", "--prompt", "x", "--size", "64x64", "--frames", "5", "--steps", "2")


@pytest.fixture(scope="module")
def weights(wan21_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of SLA for the random model, its projections not zero."""
    import torch
    from diffusers import WanTransformer3DModel

    from dit_accel.sla.weights import save_sla_weights
    from dit_accel.training.sla import SlaOptions, make_trainable

    transformer = WanTransformer3DModel.from_pretrained(wan21_folder / "transformer", torch_dtype=torch.float32)
    trainable = make_trainable(transformer.requires_grad_(False), SlaOptions(keep=0.5, block=16, order="raster"))
    with torch.no_grad():
        for parameter in trainable.projections():
            parameter.normal_(std=0.5)
    file = tmp_path_factory.mktemp("sla") / "sla.safetensors"
    save_sla_weights(file, trainable.weights())
    return file


def test_trained_weights_run(cli: Callable, wan21_folder: Path, weights: Path, tmp_path: Path) -> None:
    more = ("--seed", "1", "--set", "min_tokens=0", "--set", "dense_above=1.0", "--strict", "-o", "a.png")
    done = cli("generate", *SMALL, "--model", wan21_folder, "--sla", weights, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    report = record["clips"][0]["report"]
    assert report["self_attention_calls"]["sparse"] == 2 * 2 * 2  # steps, branches, layers that are not dense
    assert all("linear attention" in name for name in report["executor"])
    assert report["keep"]["requested"] == 0.5  # as trained, not as the preset has it


def test_a_dry_run_shows_where_the_values_come_from(cli: Callable, weights: Path, tmp_path: Path) -> None:
    done = cli("generate", "--prompt", "x", "--sla", weights, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    preset = json.loads(done.stdout)["preset"]
    assert preset["sparse"]["method"] == "sla" and preset["sparse"]["weights"] == str(weights)
    assert preset["sources"]["sparse.weights"] == "cli" and preset["sparse"]["keep"] is None
    assert preset["sparse"]["dense_above"] == 0.96  # tiny-wan-fast's own


@pytest.mark.parametrize(
    ("words", "code", "told"),
    (
        (("--sla", "none.safetensors"), 3, "cannot read none.safetensors"),
        (("--sla", "text.safetensors"), 3, "text.safetensors"),
        (("--sla", "FILE", "--set", "method=pooled"), 2, "weights of SLA are for method sla; leave one out"),
        (("--sla", "FILE", "--set", "sparse.weights=x"), 2, "the same twice; leave one out"),
        (("--sla", "FILE", "--set", "sparse.variant=all"), 2, "trained with 'complement'"),
        (("--sla",), 2, "--sla"),
    ),
)
def test_what_is_refused(words, code: int, told: str, cli: Callable, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    words = [str(weights) if word == "FILE" else word for word in words]
    done = cli("generate", "--prompt", "x", *words, cwd=tmp_path)
    assert done.returncode == code and told in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stdout == ""


def test_weights_of_another_model_are_refused(cli: Callable, weights: Path, tmp_path: Path) -> None:
    done = cli("generate", "--prompt", "x", "--sla", weights, "--size", "64x64", "--frames", "5", cwd=tmp_path)
    assert done.returncode == 2 and "SLA weights" in done.stderr and not list(tmp_path.rglob("*.mp4"))
