"""The comparison of methods: options that keep what was wanted, one record of all shards, table and picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.layout import build_layout
from dit_accel.methods import method_names

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
METHODS = ["pooled", "neighborhood"]


def run(*words, cwd, code=0):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_methods.py"), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def table():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import _method_table

        yield _method_table
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with the record of a run, and what it printed."""
    pytest.importorskip("diffusers")
    from dit_accel.testing import tiny_wan_pipeline

    folder = tmp_path_factory.mktemp("bench")
    tiny_wan_pipeline().save_pretrained(folder / "model")
    small = ["--prompts", 2, "--batch", 2, "--size", 64, "--frames", 17, "--steps", 3, "--fit-steps", 2]
    small += ["--set", "block=8", "--keeps", 0.25, "--methods", *METHODS, "--judges", 1]
    told = run("--model", "model", *small, "--out", "all", cwd=folder)
    return folder, told


def test_a_run_holds_methods_and_controls(compared):
    folder, told = compared
    record = json.loads((folder / "all" / "record.json").read_text())
    kinds = {name: told["kind"] for name, told in record["variants"].items()}
    assert kinds["dense"] == "dense" and kinds["dense,kernel=math"] == "noise floor"
    assert kinds["dense,steps=2"] == kinds["dense,steps=1"] == "fewer steps"
    for method in METHODS:
        it = record["variants"][f"{method}@0.25"]
        keep = it["figures"]["achieved_keep"]
        assert keep == pytest.approx(it["fitted_keep"], abs=0.05) and it["figures"]["fallbacks"] == {}
        assert it["keep_per_step"].keys() == {"1", "2"} and it["plans"] == {"predicted": 8}
        if method == "neighborhood":  # looks at no token: the comparison with the lot says nothing
            assert it["control"] is None
            continue
        control = record["variants"][it["control"]]
        assert control["options"]["method"] == "random"
        assert control["figures"]["achieved_keep"] == pytest.approx(keep, abs=0.05)
        assert control["options"]["dense_above"] == it["options"]["dense_above"] < 1
        assert len(it["psnr"]) == len(it["right"]) == 2
        assert it["parts"].keys() == {"predict", "reorder", "attend"} and min(it["parts"].values()) > 0
        assert it["recall"]["calls"] > 0 and abs(it["recall"]["recall"] - it["recall"]["keep"]) < 0.15
        assert 15 < it["figures"]["psnr_min"] < 60 and 0 < it["figures"]["ssim_mean"] < 1
    assert record["variants"]["neighborhood@0.25"]["set"]["window"] and record["tokens"] == 80
    assert record["environment"]["command"].startswith("python scripts/bench_methods.py")
    assert "pooled@0.25" in told and "dB over 2 prompts" in told
    assert not list((folder / "all").glob(".*"))


def test_shards_merge_and_controls_count_once(compared, tmp_path):
    folder, _ = compared
    record = json.loads((folder / "all" / "record.json").read_text())
    shards = []
    for n, dropped in enumerate(METHODS):
        variants = {name: told for name, told in record["variants"].items() if name != f"{dropped}@0.25"}
        shards.append({**record, "variants": variants})
        (tmp_path / f"{n}.json").write_text(json.dumps(shards[-1]))
    run("--merge", "0.json", "1.json", "--out", "whole", cwd=tmp_path)
    merged = json.loads((tmp_path / "whole" / "record.json").read_text())
    assert merged["variants"].keys() == record["variants"].keys()
    assert len(merged["environments"]) == 2

    (tmp_path / "1.json").write_text(json.dumps({**shards[1], "steps": 4}))
    assert "not of one run: steps" in run(
        "--merge", "0.json", "1.json", "--out", "whole", cwd=tmp_path, code=1
    )


def test_what_is_done_is_not_run_again(compared, tmp_path):
    folder, _ = compared
    record = json.loads((folder / "all" / "record.json").read_text())
    lost = {name for name, told in record["variants"].items() if told["kind"] == "fewer steps"}
    lost.add("neighborhood@0.25")
    left = [{"method": "neighborhood", "wanted": 0.25, "dense": None}]
    left.append({"method": "pooled", "wanted": 0.1, "dense": None})
    variants = {name: told for name, told in record["variants"].items() if name not in lost}
    (tmp_path / "part.json").write_text(json.dumps({**record, "variants": variants, "left": left}))
    small = ["--prompts", 2, "--batch", 2, "--size", 64, "--frames", 17, "--steps", 3, "--fit-steps", 2]
    small += ["--set", "block=8", "--keeps", 0.25, "--methods", *METHODS, "--judges", 1]
    small = ["--model", folder / "model", *small]
    run(*small, "--beside", "part.json", "--out", "rest", cwd=tmp_path)
    rest = json.loads((tmp_path / "rest" / "record.json").read_text())
    assert rest["variants"].keys() == lost | {"dense"}
    run("--merge", "part.json", "rest/record.json", "--out", "whole", cwd=tmp_path)
    whole = json.loads((tmp_path / "whole" / "record.json").read_text())
    assert whole["variants"].keys() == record["variants"].keys() and whole["left"] == left[1:]
    run("--merge", "whole/record.json", "rest/record.json", "--out", "again", cwd=tmp_path)
    again = json.loads((tmp_path / "again" / "record.json").read_text())
    assert again["variants"] == whole["variants"] and len(again["environments"]) == 3
    small[small.index("--frames") + 1] = 9
    told = run(*small, "--beside", "part.json", "--out", "other", cwd=tmp_path, code=1)
    assert "not of one run: grid" in told


def test_no_time_is_left(compared, tmp_path):
    folder, _ = compared
    small = ["--prompts", 1, "--size", 64, "--frames", 5, "--steps", 2, "--judges", 1]
    told = run("--model", folder / "model", *small, "--seconds", 0.1, "--out", "late", cwd=tmp_path)
    record = json.loads((tmp_path / "late" / "record.json").read_text())
    assert list(record["variants"]) == ["dense"] and len(record["left"]) > len(method_names())
    assert "out of time" in told


def test_table_and_picture(compared, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    folder, _ = compared
    page = tmp_path / "methods.md"
    arguments = [
        "--report",
        folder / "all" / "record.json",
        "--docs",
        page,
        "--picture",
        tmp_path / "p" / "m.png",
    ]
    assert "<!-- methods: begin -->" in run(*arguments, cwd=tmp_path, code=1)
    page.write_text("before\n<!-- methods: begin -->\nold\n<!-- methods: end -->\nafter\n")
    for _ in range(2):  # the second time it replaces its own
        run(*arguments, cwd=tmp_path)
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
        assert len({len(row) for row in rows}) == 1
        assert sum("pooled" in row[1] for row in rows) == 1 and any("fewer steps" in row[1] for row in rows)
    assert Image.open(tmp_path / "p" / "m.png").width > 1000


def test_wrong_words_are_refused(tmp_path):
    assert "there are" in run(
        "--methods", "pooledd", "--model", "tiny-wan", "--out", ".", cwd=tmp_path, code=1
    )
    assert "--model" in run("--out", ".", cwd=tmp_path, code=1)


def test_the_table_knows_every_method(table):
    missing = set(method_names()) - {"random"} - set(table.METHODS)
    assert not missing, f"say in scripts/_method_table.py how {missing} are made to keep a share"


def test_a_budget_below_what_is_forced_is_no_answer(table):
    layout = build_layout((4, 8, 8), "tiles", 32)
    forced = 0.144  # of all, and every block beyond is a share of .028
    found = table.fit(
        table.Entry(), 0.15, lambda options: forced + 0.028 * (options["keep"] > 0.1), layout, close=0.01
    )
    assert found.keep == forced + 0.028 and found.options["keep"] > 0.1 and found.reached
    found = table.fit(table.Entry(), 0.15, lambda options: max(forced, options["keep"]), layout, close=0.01)
    assert found.options["keep"] == 0.15
    # nor is one that forced blocks make a multiple of, though a little nearer
    found = table.fit(table.Entry(), 0.15, lambda o: 0.163 if o["keep"] < 0.08 else 0.168, layout, close=0.01)
    assert found.reached and found.keep == 0.168


def test_the_search_finds_what_keeps_as_much(table):
    layout = build_layout((4, 8, 8), "tiles", 32)
    asked = []

    def keeps(options):
        asked.append(options)
        return 1 / (1 + 2.0 ** options["threshold"])  # falls

    lite = table.METHODS["lite"]
    found = table.fit(lite, 0.7, keeps, layout, 0.005)
    assert found.reached and found.keep == pytest.approx(0.7, abs=0.005) and len(asked) < 16
    assert set(found.options) == {"threshold"}

    # one that keeps what it is told needs no search; one that keeps more than wanted gives its nearest
    asked.clear()
    assert table.fit(table.Entry(), 0.3, lambda o: asked.append(o) or o["keep"], layout, 0.005).keep == 0.3
    assert asked in ([{"keep": 0.3}], [{"keep": 0.3}] * 2)
    found = table.fit(table.Entry(), 0.1, lambda o: max(o["keep"], 0.4), layout, 0.005)
    assert not found.reached and found.keep == 0.4
    # further fixed options are tried only where the first ones cannot
    entry = table.Entry(options=({}, {"loose": True}))
    found = table.fit(entry, 0.1, lambda o: max(o["keep"], 0.0 if "loose" in o else 0.4), layout, 0.005)
    assert found.reached and found.options == {"loose": True, "keep": 0.1}
    # and where the first ones keep what was wanted only when told to keep next to nothing, and choose nothing
    found = table.fit(entry, 0.3, lambda o: o["keep"] + (0.0 if "loose" in o else 0.29), layout, 0.005)
    assert found.options == {"loose": True, "keep": 0.3}


def test_work_is_shared_out_evenly_and_controls_are_shared(table):
    import bench_methods

    jobs = [bench_methods.Job(None, dense="steps=3")]
    jobs += [bench_methods.Job(name, keep) for keep in (0.25, 0.1) for name in table.METHODS]
    parts = bench_methods.share_out(jobs, 3)
    assert sorted(map(jobs.index, (job for part in parts for job in part))) == list(range(len(jobs)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 6
    for part in parts:
        assert part == sorted(part, key=jobs.index)
    where = {job: n for n, part in enumerate(parts) for job in part}
    for keep in (0.25, 0.1):
        of = [where[bench_methods.Job(name, keep)] for name in table.METHODS if name.startswith("rectified")]
        assert len(set(of)) == 1, "entries of one method share their controls"


def test_what_keeps_too_much_at_a_tenth_is_not_searched_at_a_twentieth(table):
    from bench_methods import Job, least_kept

    found = {"unreached": [{"method": "lite", "wanted": 0.1, "nearest": 0.175}]}
    assert least_kept([found], Job("lite", 0.05)) == {"method": "lite", "wanted": 0.05, "nearest": 0.175}
    others = (Job("lite", 0.1), Job("lite", 0.25), Job("radial", 0.05), Job(None, dense="steps=4"))
    assert not any(least_kept([found], job) for job in others)
    too_little = {"unreached": [{"method": "clear", "wanted": 0.5, "nearest": 0.3}]}
    assert least_kept([too_little], Job("clear", 0.35)) is None, "too little at a half may do at a third"


def test_variations_are_for_few_keeps(table):
    assert table.chosen_methods(["all"]) == list(table.METHODS)
    for name, entry in table.METHODS.items():
        assert (entry.keeps is None) == (entry.of is None), name


def test_windows_are_whole_tiles(table):
    layout = build_layout((5, 16, 16), "tiles", 128, tile=(2, 8, 8))
    windows = [options["window"] for options in table.windows(layout)]
    assert windows[0] == [5, 16, 16] and [2, 8, 8] in windows and [2, 8, 16] in windows
    assert [2, 16, 8] not in windows, "rows and columns are alike"
