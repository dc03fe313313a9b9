"""The benchmark of full-size transformers, on tiny ones: it measures what it says, and refuses wrong results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts_on_the_path():
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def run(*arguments):
    command = [sys.executable, str(SCRIPTS / "bench_pipeline.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_record_holds_every_variant_and_the_table_is_made_of_it(tmp_path):
    out = tmp_path / "record.json"
    scenarios = ["wan-14b-720p", "hunyuan-video-720p", "flux-1024", "sd3.5-large-1024"]
    asked = ["--tiny", "--device", "cpu", "--dtype", "float32", "--rounds", 2, "--keeps", 0.25, "--out", out]
    done = run("--scenarios", *scenarios, *asked)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [result["scenario"] for result in record["results"]] == scenarios
    assert "bench_pipeline.py" in record["environment"]["command"]
    for result in record["results"]:
        assert set(result["variants"]) == {"stock diffusers", "pooled, keep 0.25"}
        sparse = result["variants"]["pooled, keep 0.25"]
        assert sparse["calls"]["sparse"] > 0 and sparse["calls"]["dense"] == 0
        assert 0.2 < sparse["keep_achieved"] < 0.8  # text and the own block are always read
        assert len(sparse["milliseconds"]) == 2 and result["attention"]["pooled, keep 0.25"]["dense"] > 0
        assert result["check"]["keep_all"] < 1e-5
    again = run("--report", out)
    assert again.returncode == 0 and "pooled, keep 0.25" in again.stdout and "of the forward" in again.stdout


def test_a_wrong_result_is_not_timed(monkeypatch):
    import bench_pipeline
    from _full_size import SCENARIOS

    scenario = SCENARIOS["flux-1024"]
    transformer = scenario.build(torch.device("cpu"), torch.float32, **bench_pipeline._tiny(scenario))
    assert bench_pipeline.check(scenario, transformer)["keep_all"] < 1e-5
    honest = bench_pipeline.install
    monkeypatch.setattr(bench_pipeline, "install", lambda t, options: honest(t, options | {"keep": 0.1}))
    with pytest.raises(bench_pipeline.WrongResult, match="from stock diffusers"):
        bench_pipeline.check(scenario, transformer)


def test_full_size_models_have_the_published_parameters():
    """Counted on no device; billions as the models are named or documented."""
    from _full_size import SCENARIOS

    billions = {
        "wan-1.3b-480p": 1.42, "wan-14b-720p": 14.29, "hunyuan-video-720p": 12.82, "flux-1024": 11.90,
        "sd3.5-large-1024": 8.06,
    }  # fmt: skip
    for name, expected in billions.items():
        made = SCENARIOS[name].build(torch.device("meta"), torch.bfloat16)
        assert sum(p.numel() for p in made.parameters()) / 1e9 == pytest.approx(expected, rel=0.02), name
