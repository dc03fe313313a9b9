"""Region sampling at full size: the same script on tiny models tells what it should."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_region

    return bench_region


@pytest.fixture
def run(script, monkeypatch, capsys):
    """Run the script with some arguments and give what it printed."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["bench_region.py", *map(str, words)])
        script.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("case", ["wan-1.3b-480p", "flux-1024", "sd3.5-large-1024"])
def test_what_a_run_tells(run, tmp_path, case):
    out = tmp_path / "region.json"
    told = run("--tiny", "--cases", case, "--steps", 8, "--ratios", 0.5, "--rounds", 1, "--out", out)
    record = json.loads(out.read_text())
    dense, part = (record["cases"][0]["variants"][name] for name in ("dense", "region 0.5"))
    assert (dense["whole_forwards"], dense["part_forwards"], dense["bound"]) == (8, 0, None)
    assert part["whole_forwards"] + part["part_forwards"] == 8 and part["part_forwards"] == 4
    assert part["options"]["sample_ratio"] == 0.5 and 1 < part["bound"] < 2
    assert 0 < part["part_ms"] and part["transformer_seconds"] < part["run_seconds"]
    assert part["times_as_fast"] == pytest.approx(dense["transformer_seconds"] / part["transformer_seconds"])
    assert f"{case}, " in told and "4 + 4" in told
    sparse, both = list(record["cases"][0]["variants"].values())[2:]
    assert sparse["sparse_calls"] > both["sparse_calls"] / 2 > 0 and sparse["options"] is None
    assert both["options"]["unit"] == "block" and both["part_forwards"] == 4
    assert not any("region" in reason for reason in both["dense_reasons"])

    page = tmp_path / "page.md"
    page.write_text("<!-- region: begin -->\nnothing\n<!-- region: end -->\n")
    run("--report", out, "--docs", page)
    assert "region 0.5" in page.read_text() and "nothing" not in page.read_text()


def test_what_is_not_dense_is_not_timed(run, script, monkeypatch):
    monkeypatch.setattr(script.torch, "equal", lambda *_: False)
    with pytest.raises(SystemExit, match="nothing is timed"):
        run("--tiny", "--cases", "flux-1024", "--steps", 4)


def test_a_bad_case_is_named(run):
    with pytest.raises(SystemExit):
        run("--cases", "flux-4096")
