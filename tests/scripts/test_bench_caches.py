"""The table of step caches: what a run with fewer steps would have given at the same cost."""

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


def figures(psnr, forwards):
    cell = {"right": 3, "of": 4}
    return {
        "seconds_per_prompt": 2.0, "psnr_mean": psnr, "psnr_min": psnr - 1, "ssim_mean": 0.9, "forwards": forwards,
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


def test_default_variants_can_be_run(script):
    from dit_accel.preset import load_preset

    preset = load_preset("tiny-wan-fast")
    variants = [script.parse_variant(text, preset, 20) for text in script.VARIANTS]
    assert sum(variant.cache is not None for variant in variants) >= 8
    assert variants[0].options is None and variants[-1].options["cache"]["name"] == "latent"


def test_what_is_missing_is_told(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_caches.py"])
    with pytest.raises(SystemExit, match="--model and --out are needed"):
        script.main()
