"""scripts/evaluate_images.py measures text-to-image models, dense and sparse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def scripts_on_the_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """Run the script in this process; returns the record and what was printed."""
    import evaluate_images

    def run(*words):
        argv = [
            str(SCRIPTS / "evaluate_images.py"),
            *map(str, words),
            "--judges",
            "1",
            "--out",
            str(tmp_path),
        ]
        monkeypatch.setattr(sys, "argv", argv)
        evaluate_images.main()
        return json.loads((tmp_path / "record.json").read_text()), capsys.readouterr().out

    return run


def save_random_model(family, folder):
    import torch
    from tiny_image.dit import make_student
    from tiny_image.models import make_vae

    torch.manual_seed(0)
    make_student(family).make_pipeline(make_vae()).save_pretrained(folder)
    return folder


def test_flux_dense_and_sparse(evaluate, tmp_path):
    model = save_random_model("flux", tmp_path / "flux")
    words = ["--size", 128, "--steps", 2, "--prompts", 3, "--batch", 2, "--show", 1]
    variants = ["dense", "keep=0.1,dense_above=1,neighbours=0", "steps=1,guidance=1"]
    record, text = evaluate("--model", model, *words, "--variants", *variants)
    assert [row["prompt"] for row in record["rows"]["dense"]] == [0, 1, 2]
    dense, sparse, short = (record["summary"][name] for name in variants)
    assert set(dense["accuracy"]) == {"colour", "shape", "background", "everything"}
    assert dense["two_objects"]["shape"]["of"] == 1 and "psnr_mean" not in dense
    assert sparse["sparse_share"] == 1 and sparse["achieved_keep"] < 0.5 and sparse["fallbacks"] == {}
    assert 20 < sparse["psnr_mean"] < 90 and "flicker_mean" not in sparse
    assert short["denoise_seconds_per_prompt"] < dense["denoise_seconds_per_prompt"]
    assert "scripts/evaluate_images.py" in record["environment"]["command"]
    assert "against dense: PSNR" in text and "temporal" not in text
    assert (tmp_path / "sheet-0of1.png").exists() and (tmp_path / "prompt-0.png").exists()
    merged, _ = evaluate("--merge", tmp_path / "record.json")
    assert merged["summary"] == record["summary"]


def test_sd3_dense(evaluate, tmp_path):
    model = save_random_model("sd3", tmp_path / "sd3")
    words = ["--size", 64, "--steps", 2, "--prompts", 2, "--show", 0]
    record, _ = evaluate("--model", model, *words, "--variants", "dense", "dense,kernel=math")
    math = record["summary"]["dense,kernel=math"]
    assert math["psnr_mean"] is None or math["psnr_mean"] > 60


def test_a_video_model_is_refused(evaluate):
    with pytest.raises(SystemExit, match="drives FluxPipeline and StableDiffusion3Pipeline"):
        evaluate("--model", "tiny-wan")
