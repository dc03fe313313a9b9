"""Caches side by side: what the tables say, and that the cases tell a cache that leaks from one that does not."""

import copy
import json
import sys
from pathlib import Path

import pytest

from dit_accel.testing import tiny_wan_pipeline

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    import compare_caches

    yield compare_caches
    sys.path.remove(str(SCRIPTS))


def run(name, package, forwards, psnr, **more):
    return {
        "name": name, "package": package, "forwards": forwards, "blocks": forwards, "attentions": forwards,
        "seconds": 2.0, "busy": 1.5, "psnr": psnr, **more,
    }  # fmt: skip


@pytest.fixture
def record(script):
    cases = dict.fromkeys(script.CASES, 0.0)
    broken = {**cases, "broken off after a step": "E: no"}
    return {
        "environment": {"chip": "CPU", "versions": {"torch": "2"}, "date": "2026-01-02T03", "commit": "abc"},
        "packages": {"dit_accel": "0", "diffusers": "0.42", "cache-dit": None},
        "model": "tiny-wan", "size": 64, "frames": 9, "steps": 20, "prompts": ["a"],
        "runs": [
            run("dense", "", 1.0, [None]),
            run("10 steps", "fewer steps", 0.5, [20.0]),
            run("5 steps", "fewer steps", 0.25, [10.0]),
            run("first_block, threshold 0.1", "dit_accel", 0.5, [26.0], pair="First block at 0.1"),
            run("latent", "dit_accel", 0.375, [30.0], pair=None),
            run("F1B0, threshold 0.1", "cache-dit", 0.5, [25.0], pair="First block at 0.1"),
            run("PAB", "diffusers", 1.0, [22.0]) | {"attentions": 0.6},
            {"name": "FasterCache", "package": "diffusers", "error": "IndexError: tuple | index"},
        ],
        "cases": {
            "size": 32, "frames": 1, "steps": 10,
            "rows": [
                {"name": "latent", "package": "dit_accel", "ran": 0.5, "apart": cases},
                {"name": "PAB", "package": "diffusers", "ran": 1.0, "apart": {**cases, "one prompt, two, one": 0.25}},
                {"name": "F", "package": "diffusers", "ran": 1.0, "apart": broken},
                {"name": "G", "package": "cache-dit", "error": "ImportError: none"},
            ],
        },
    }  # fmt: skip


def test_a_cache_stands_beside_fewer_steps_at_equal_cost(script, record):
    shown = script.markdown_of(record)
    assert "| dit_accel | latent | 37.5% | 30.00 (30.00) | 15.00 (+15.00) | 2.00 (1.50) |" in shown
    assert "latent, 30.00 dB with 37.5%, +15.00 dB against fewer steps" in shown
    assert "First block at 0.1: dit_accel 26.00 dB with 50.0% of the forwards, cache-dit 25.00 dB with 50.0%" in shown
    assert "| diffusers | PAB | 100.0% (self-attentions 60.0%) |" in shown


def test_what_fails_is_named(script, record):
    shown = script.markdown_of(record)
    assert "| diffusers | FasterCache | fails: IndexError: tuple / index | | | |" in shown
    assert "| cache-dit | G | | fails: ImportError: none |" in shown
    assert "**0.25**" in shown and "**E: no**" in shown
    assert shown.count("**") == 4


def test_tables_stand_between_the_marks(script, record, tmp_path, monkeypatch):
    page, path = tmp_path / "page.md", tmp_path / "record.json"
    path.write_text(json.dumps(record))
    page.write_text("before\n<!-- comparison: begin -->\noutdated\n<!-- comparison: end -->\nbehind\n")
    monkeypatch.setattr(sys, "argv", ["compare_caches.py", "--report", str(path), "--docs", str(page)])
    script.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("behind\n") and "outdated" not in text
    assert script.markdown_of(record) in text
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="put the lines"):
        script.main()


def test_the_page_shows_the_record_that_is_kept(script):
    record = json.loads((SCRIPTS / "results" / "compare_caches_tiny_wan_cpu.json").read_text())
    assert script.markdown_of(record) in (SCRIPTS.parent / "docs" / "caches.md").read_text(encoding="utf-8")
    ours = [row["apart"] for row in record["cases"]["rows"] if row["package"] == "dit_accel"]
    assert len(ours) >= 5 and all(set(row.values()) == {0.0} and set(script.CASES) < set(row) for row in ours)


def bench_of(script, package, start):
    """The first rival of a package whose name begins so, on random weights."""
    base = tiny_wan_pipeline()

    def make():
        own = {"transformer": copy.deepcopy(base.transformer), "scheduler": copy.deepcopy(base.scheduler)}
        pipe = type(base)(**{**base.components, **own})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    rival = next(r for r in script.make_case_rivals() if r.package == package and r.name.startswith(start))
    call = {"negative_prompt": "", "height": 64, "width": 64, "num_frames": 5}
    setting = script.Setting(10, (1.0, *[0.98] * 9))
    return script.Bench(make, rival, setting, call, ("a red star", "a blue circle"), 5.0)


@pytest.mark.parametrize("cache", ["first_block", "latent"])
def test_nothing_leaks_here(script, cache, one_thread):
    found = script.try_cases(bench_of(script, "dit_accel", cache))
    assert found["ran"] < 0.8
    assert found["apart"] == dict.fromkeys(["two fresh runs", *script.CASES], 0.0)


def test_a_leak_is_seen(script, one_thread):
    """diffusers drops what it keeps where a run ends well; pyramid attention keeps one memory for both branches."""
    bench = bench_of(script, "diffusers", "FirstBlockCache")
    assert script.CASES["broken off after a step"](bench) != 0
    assert script.CASES["one prompt, two, one"](bench) == 0
    bench = bench_of(script, "diffusers", "Pyramid")
    assert script.CASES["guidance for some steps only"](bench) != 0


def test_a_class_is_left_as_it_was(script):
    def put(pipe, setting):
        type(pipe).__call__ = lambda self: None
        type(pipe)._is_cached = True

    pipe = tiny_wan_pipeline()
    before = dict(vars(type(pipe)))
    with script.Rival("a", "b", put).on(pipe, script.Setting(10, ())):
        assert type(pipe)._is_cached
    assert dict(vars(type(pipe))) == before
