"""scripts/evaluate_quality.py runs sharded on a source tree, merges, and records what the tables need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate_quality.py"
VARIANTS = ["dense", "fast,min_tokens=0", "random,keep=0.5,min_tokens=0", "steps=1", "dense,kernel=math"]


def run(*words, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("diffusers")
    from dit_accel.testing import tiny_wan_pipeline

    folder = tmp_path_factory.mktemp("model")
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


def test_shards_merge_into_one_record(model, tmp_path):
    common = [
        "--model",
        model,
        "--variants",
        *VARIANTS,
        "--prompts",
        3,
        "--size",
        64,
        "--frames",
        17,
        "--steps",
        2,
    ]
    for shard in ("0/2", "1/2"):
        run(*common, "--shard", shard, "--batch", 2, "--judges", 1, "--show", 1, "--out", "out", cwd=tmp_path)
    shards = [tmp_path / "out" / f"record-{i}of2.json" for i in range(2)]
    text = run("--merge", *shards, "--out", "merged", cwd=tmp_path)
    record = json.loads((tmp_path / "merged" / "record.json").read_text())

    assert [row["prompt"] for row in record["rows"]["dense"]] == [0, 1, 2]
    fast, random = (record["options"][name] for name in VARIANTS[1:3])
    assert random["method"] == "random" and random["keep"] == 0.5
    assert random["neighbours"] == fast["neighbours"] == 1, "the control is forced to read what the method is"
    summary = record["summary"]
    assert summary["dense"]["accuracy"]["shape"]["of"] == 3
    assert summary["dense"]["two_objects"]["shape"]["of"] == 1
    assert "psnr_mean" not in summary["dense"]
    assert summary["fast,min_tokens=0"]["sparse_share"] > 0
    assert summary["fast,min_tokens=0"]["fallbacks"] == {}
    assert summary["steps=1"]["psnr_mean"] < summary["dense,kernel=math"]["psnr_mean"]
    assert record["environments"][0]["versions"]["torch"]
    assert "against dense: PSNR" in text
    assert (tmp_path / "out" / "sheet-0of2.png").exists()
    assert any((tmp_path / "out").glob("prompt-0.*"))


def test_a_hunyuanvideo_is_run_as_its_preset_says(tmp_path):
    """Guidance is told as a number, the scheduler has its own name for the shift, and there is no negative prompt."""
    pytest.importorskip("diffusers")
    from dit_accel.testing import tiny_hunyuan_video_with_text

    tiny_hunyuan_video_with_text().save_pretrained(tmp_path / "model")
    variants = ["dense", "fast,min_tokens=0,block=16,dense_above=1", "guidance=1", "shift=9"]
    sizes = ("--size", 64, "--frames", 9, "--steps", 2, "--prompts", 2, "--batch", 2)
    common = ("--model", "model", *sizes, "--judges", 1, "--show", 0, "--out", "out")
    run(*common, "--preset", "tiny-hunyuan-pooled", "--variants", *variants, cwd=tmp_path)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (record["guidance"], record["flow_shift"], record["frames"]) == (4.0, 5.0, 9)
    assert record["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    summary = record["summary"]
    assert summary[variants[1]]["sparse_share"] == 1 and summary[variants[1]]["fallbacks"] == {}
    for other in variants[2:]:
        assert summary[other]["psnr_mean"] < 90, "neither is lost on the way"


def test_a_lost_shard_is_noticed(tmp_path):
    record = {"rows": {"dense": [{"prompt": 1}]}, "variants": ["dense"], "prompts": 2, "environment": {}}
    keys = ("model", "options", "grid", "seed", "steps", "size", "frames", "dtype", "batch")
    (tmp_path / "one.json").write_text(json.dumps({**dict.fromkeys(keys), **record}))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--merge", "one.json", "--out", "."],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "exactly once" in done.stderr


@pytest.mark.parametrize(
    "variant", ["dence", "dense,keep=0.5", "fast,keeep=0.5", "fast,kernel=math", "dense,compile=2"]
)
def test_unknown_variants_are_refused(variant, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", "none", "--variants", variant, "--out", "."],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "keeep" in done.stderr or "variant" in done.stderr


def test_a_compiled_variant_has_a_pipeline_of_its_own(model, monkeypatch):
    import torch
    from diffusers import WanPipeline

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from evaluate_quality import parse_variant, pipelines_for

    from dit_accel.preset import load_preset

    pipe = WanPipeline.from_pretrained(model, dtype=torch.float32)
    plain, compiled = (
        parse_variant(text, load_preset("tiny-wan-fast"), 2) for text in ("dense", "dense,compile=true")
    )
    assert (plain.compiled, compiled.compiled) == (False, True)
    assert pipelines_for([plain], pipe) == {False: pipe}
    both = pipelines_for([plain, compiled], pipe)
    assert both[False] is pipe and both[True].vae is pipe.vae
    assert [block._compiled_call_impl is None for block in pipe.transformer.blocks] == [True] * len(
        pipe.transformer.blocks
    )
    assert all(block._compiled_call_impl is not None for block in both[True].transformer.blocks)
