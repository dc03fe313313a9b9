"""Full-size forwards: the sizes are the published ones, and the same script on tiny models tells what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# parameters of the published transformers, as diffusers counts them
PARAMETERS = {
    "wan-1.3b-480p": 1_418_996_800,
    "wan-14b-720p": 14_288_491_584,
    "hunyuanvideo-720p": 12_821_012_544,
    "flux-1024": 11_901_408_320,
    "sd3.5-large-1024": 8_056_627_520,
}
# visual tokens of a forward
TOKENS = {
    "wan-1.3b-480p": (21, 30, 52),
    "wan-14b-720p": (21, 45, 80),
    "hunyuanvideo-720p": (33, 45, 80),
    "flux-1024": (1, 64, 64),
    "flux-2048": (1, 128, 128),
    "flux-4096": (1, 256, 256),
    "sd3.5-large-1024": (1, 64, 64),
}
SMALL = ("--tiny", "--rounds", "2")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import bench_pipeline

        yield bench_pipeline
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def run(script, monkeypatch, capsys):
    """Run the script with some arguments; returns its exit code and what it printed."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["bench_pipeline.py", *map(str, words)])
        try:
            code = script.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code)
        told = capsys.readouterr()
        return code, told.out + told.err

    return call


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A folder with a record of three families, and what was printed: once in a process of its own."""
    folder = tmp_path_factory.mktemp("full")
    cases = ("wan-1.3b-480p", "hunyuanvideo-720p", "flux-1024")
    command = [sys.executable, SCRIPTS / "bench_pipeline.py", *SMALL, "--keeps", "0.5", "--cases", *cases]
    done = subprocess.run(
        [*map(str, command), "--out", "r.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_sizes_are_the_published_ones(script, name):
    import torch

    case = script.CASES[name]
    model = script.build_transformer(case, torch.device("meta"), torch.bfloat16, whole=True)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    kept = type(model)._keep_in_fp32_modules or ()
    for key, parameter in model.named_parameters():
        assert (parameter.dtype == torch.float32) == bool(set(kept) & set(key.split("."))), key


def test_the_grids_are_the_published_ones(script):
    assert {name: case.grid for name, case in script.CASES.items()} == TOKENS


def test_every_case_has_sparse_presets_for_its_model(script):
    from dit_accel.preset import load_preset

    for case in script.CASES.values():
        assert len(case.presets) == 2
        for name in case.presets:
            assert load_preset(name).model == case.model and load_preset(name).sparse is not None


def test_a_record_tells_time_share_memory_and_what_ran(timed):
    folder, printed = timed
    record = json.loads((folder / "r.json").read_text())
    assert record["weights"] == "random" and record["failed"] == [] and record["tiny"]
    assert record["environment"]["versions"]["torch"] and record["environment"]["date"]
    assert [case["case"] for case in record["cases"]] == ["wan-1.3b-480p", "hunyuanvideo-720p", "flux-1024"]
    for case in record["cases"]:
        dense, sparse = case["variants"]["dense"], case["variants"]["pooled@0.5"]
        layers = sum(case["layers_built"].values())
        for one in (dense, sparse):
            assert len(one["seconds_each"]) == case["rounds"] == 2 and min(one["seconds_each"]) > 0
            assert len(one["attention_ms_each"]) == layers and 0 < one["attention_share"] < 1
            assert one["peak_above_bytes"] > 0
        assert dense["times_as_fast"] == 1 and dense["kernels"]
        ratios = [d / s for d, s in zip(dense["seconds_each"], sparse["seconds_each"], strict=True)]
        assert sparse["times_as_fast_each"] == pytest.approx(ratios)
        # the warm forward and the timed one
        assert sparse["sparse_calls"] == 2 * layers and sparse["dense_reasons"] == {}
        assert 0.4 < sparse["keep"] < 0.7 and sparse["executors"] == {"cpu": 2 * layers}
        check = sparse["check"]
        assert check["problem"] is None and 0 < check["error"] <= check["limit"] < 1e-4
        assert 0 < sparse["predict_ms_per_layer"] < sparse["attention_ms_per_layer"]
    assert "x" in printed and "NOT TIMED" not in printed


def test_fewer_layers_are_scaled_and_marked(timed, run, tmp_path):
    folder, _ = timed
    record = json.loads((folder / "r.json").read_text())
    scaled = {case["case"]: case["scaled"] for case in record["cases"]}
    assert scaled == {"wan-1.3b-480p": False, "hunyuanvideo-720p": True, "flux-1024": False}
    shallow = record["cases"][1]
    assert shallow["layers_built"] == {"transformer_blocks": 1, "single_transformer_blocks": 1}
    for one in shallow["variants"].values():
        assert 1.3 < one["scaled_by"] < 2  # twice the blocks, and what is no block but once
    out = tmp_path / "w.json"
    assert run(*SMALL, "--keeps", 0.5, "--cases", "hunyuanvideo-720p", "--whole", "--out", out)[0] == 0
    (whole,) = json.loads(out.read_text())["cases"]
    assert not whole["scaled"] and {one["scaled_by"] for one in whole["variants"].values()} == {1}


def test_presets_lose_what_a_single_forward_cannot_show(run, tmp_path):
    out = tmp_path / "r.json"
    assert run(*SMALL, "--cases", "wan-1.3b-480p", "--presets", "wan21-fast", "--out", out)[0] == 0
    (case,) = json.loads(out.read_text())["cases"]
    one = case["variants"]["wan21-fast"]
    assert one["source"] == "preset wan21-fast, provisional" and one["not_in_it"] == [
        "dense steps",
        "dense layers",
    ]
    assert one["options"]["order"] == "packed" and one["options"]["dense_layers"] == []
    assert one["options"]["min_tokens"] == 0 and one["keep"] == pytest.approx(0.25, abs=0.05)


def test_what_is_wrong_is_not_timed(run, tmp_path, monkeypatch):
    """A kernel that is wrong by a hundredth: no figure of it is printed or recorded."""
    import dit_accel.kernels.block_sparse as kernels

    right = kernels.block_sparse

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out * 1.01, lse

    monkeypatch.setattr(kernels, "block_sparse", wrong)
    out = tmp_path / "r.json"
    code, told = run(*SMALL, "--keeps", 0.5, "--cases", "wan-1.3b-480p", "--out", out)
    record = json.loads(out.read_text())
    assert code == 1 and record["cases"] == [] and "ratio" not in told
    assert record["failed"][0]["variant"] == "pooled@0.5" and "from dense" in record["failed"][0]["problem"]
    assert "NOT TIMED wan-1.3b-480p" in told


def test_a_full_plan_that_runs_dense_proves_nothing(run, monkeypatch):
    """Dense equals dense: the check must not take that for a right kernel."""
    from dit_accel.engine import Engine

    monkeypatch.setattr(Engine, "_why_all_dense", lambda *_: ("for no reason", True))
    code, told = run(*SMALL, "--keeps", 0.5, "--cases", "flux-1024")
    assert code == 1 and "NOT TIMED flux-1024 pooled@0.5: of the check's calls 0 were sparse" in told


def test_a_family_nobody_describes_is_told(run, monkeypatch):
    import dit_accel.adapters as adapters

    monkeypatch.delitem(adapters.FAMILIES, "FluxTransformer2DModel")
    code, told = run(*SMALL, "--keeps", 0.5, "--cases", "flux-1024")
    assert code == 1 and "NOT TIMED flux-1024" in told and "no family" in told


def test_the_table(timed, run, tmp_path):
    folder, _ = timed
    record = folder / "r.json"
    page = tmp_path / "full-size.md"
    arguments = ("--report", record, "--docs", page)
    code, told = run(*arguments)
    assert code == 1 and "full size: begin" in told
    page.write_text("before\n<!-- full size: begin -->\nold\n<!-- full size: end -->\nafter\n")
    for _ in range(2):  # the second time it replaces its own
        assert run(*arguments)[0] == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
        assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + 3 * 2  # head, rule, variants
        assert "random weights" in text and "scaled to all of them" in text
    assert "hunyuanvideo-720p, 360 tokens *" in run("--report", record)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "flux"], "there are wan-1.3b-480p"),
        (["--presets", "wan21-fast", "--keeps", 0.5], "either --presets or"),
        (["--presets", "wan21-dense", "--cases", "flux-1024"], "preset wan21-dense is dense"),
        (["--noise", 1], "--noise from 0.1 to 0.9"),
    ],
)
def test_wrong_words_are_refused(words, message, run):
    code, told = run("--tiny", *words)
    assert code in (1, 2) and message in told
