"""The table of step caches: what a run with fewer steps would have given at the same cost."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    import bench_caches

    yield bench_caches
    sys.path.remove(str(SCRIPTS))


def figures(psnr, forwards, regions=None, seconds=2.0):
    cell = {"right": 3, "of": 4}
    return {
        "seconds_per_prompt": seconds, "regions": regions or {},
        "psnr_mean": psnr, "psnr_min": psnr - 1, "ssim_mean": 0.9, "forwards": forwards,
        "accuracy": {"shape": cell, "colour": cell},
    }  # fmt: skip


def test_gain_is_against_fewer_steps_at_equal_cost(script, capsys):
    names = ["dense", "steps=5", "steps=10", "dense,cache=easy", "dense,cache=latent"]
    record = {
        "preset": "tiny-wan-fast", "steps": 20, "variants": names,
        "summary": {
            "dense": figures(0, {}),
            "steps=5": figures(10.0, {}),
            "steps=10": figures(20.0, {}),
            "dense,cache=easy": figures(18.0, {"computed": 15, "reused": 25}),  # 37.5 %: between the two
            "dense,cache=latent": figures(30.0, {"computed": 30, "reused": 10}),  # beyond what was run
        },
    }  # fmt: skip
    rows = {name: script.row_of(record, name) for name in names[1:]}
    assert [rows[name]["cost"] for name in names[1:]] == [0.25, 0.5, 0.375, 0.75]
    fewer = [(0.25, 10.0), (0.5, 20.0)]
    assert script.at_cost(fewer, 0.375) == 15.0
    assert script.at_cost(fewer, 0.75) is None
    script.print_table(record)
    shown = capsys.readouterr().out
    assert "+3.00 dB" in shown and "6/8" in shown


def test_tokens_count_as_much_as_forwards(script, tmp_path, monkeypatch):
    names = ["dense", "steps=5", "steps=15", "dense,region=0.5"]
    regions = {"50 of 100 tokens": 30, "100 of 100 tokens": 10}
    record = {
        "preset": "tiny-wan-fast", "steps": 20, "variants": names, "environment": {"chip": "a chip"}, "frames": 9,
        "model": "tiny-wan", "size": 64, "batch": 1, "dtype": "torch.float32", "rows": {"dense": [1, 2]},
        "summary": {
            "dense": figures(0, {}, seconds=4.0),
            "steps=5": figures(10.0, {}, seconds=1.0),
            "steps=15": figures(20.0, {}, seconds=3.0),
            "dense,region=0.5": figures(25.0, {}, regions, seconds=2.0),
        },
    }  # fmt: skip
    assert script.row_of(record, "dense,region=0.5")["cost"] == 0.625
    assert script.share_of_tokens({}) == 1.0
    last = script.cells_of(record)[-1]
    assert last[1] == "62%" and last[2] == "2.00 (2.00x)"
    assert last[-2:] == ["17.50 (+7.50 dB)", "15.00 (+10.00 dB)"]
    (tmp_path / "record.json").write_text(json.dumps(record))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- caches: begin -->\nold\n<!-- caches: end -->\nbehind\n")
    words = ["--report", str(tmp_path / "record.json"), "--docs", str(page)]
    monkeypatch.setattr(sys, "argv", ["bench_caches.py", *words])
    script.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("behind\n") and "old" not in text
    assert "| dense,region=0.5 | 62% |" in text and "2 prompts in batches of 1, torch.float32, a chip." in text


def test_default_variants_can_be_run(script):
    from dit_accel.preset import load_preset

    preset = load_preset("tiny-wan-fast")
    variants = [script.parse_variant(text, preset, 20) for text in script.VARIANTS]
    assert sum(variant.cache is not None for variant in variants) >= 8
    assert variants[0].options is None and variants[-1].options["cache"]["name"] == "latent"


def test_what_is_missing_is_told(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_caches.py"])
    with pytest.raises(SystemExit, match="--out DIR and --model DIR"):
        script.main()
