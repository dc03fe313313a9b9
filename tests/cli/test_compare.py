"""`dit-accel compare`: two clips, two folders, images, or the record of a run; figures, JSON and the page."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dit_accel.cli.app import run
from dit_accel.pipelines.video import read_clip, write_clip
from dit_accel.quality.metrics import frame_psnr, psnr

Told = tuple[int, str, str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., Told]:
    """Run a command in the test's folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*words: str | Path) -> Told:
        code = run([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def made(cli: Callable, wan21_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run: two clips of five frames with their dense twins, and run.json."""
    folder = tmp_path_factory.mktemp("made")
    done = cli(
        "generate", "--preset", "wan21-fast", "--model", wan21_folder, "--size", "64x64", "--frames", "5",
        "--steps", "3", "--seed", "7", "--count", "2", "--compare-dense", "--prompt", "a red star", "-o", "a.mp4",
        "--set", "block=16", "--set", "min_tokens=0", "--set", "dense_above=1.0", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def clips(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Two folders with the lossless clip moving.gif and the image still.png; b's moving.gif is far off at frame 2."""
    shades = (np.arange(32 * 48).reshape(32, 48) // 24 % 4 * 85).astype(np.uint8)  # few: GIF keeps them
    moving = np.stack([np.roll(shades, 5 * n, 1) for n in range(4)])
    dense = np.stack([moving] * 3, axis=-1)
    fast = dense.copy()
    fast[2, :16] = 255 - fast[2, :16]
    for side, frames in (("a", dense), ("b", fast)):
        write_clip(tmp_path / side / "moving.gif", frames, 10)
        write_clip(tmp_path / side / "still.png", frames[:1], 0)
    return dense, fast


def test_a_run_against_its_dense_twins(call: Callable[..., Told], made: Path, tmp_path: Path) -> None:
    code, out, err = call("compare", made / "run.json", "--json", "--out", "report")
    assert code == 0, err
    told = json.loads(out)
    assert told["labels"] == ["dense", "wan21-fast"] and told["page"] == "report/index.html"
    record = json.loads((made / "run.json").read_text())
    for clip, one in zip(record["clips"], told["clips"], strict=True):
        assert one["told"] == f"a red star (seed {clip['seed']})" and one["frames"] == [5, 64, 64]
        assert one["seconds"] == [clip["dense"]["seconds"], clip["seconds"]]
        twin, own = (read_clip(Path(side[0]))[0] for side in one["files"])
        assert one["psnr_db"] == pytest.approx(psnr(own, twin))
        assert one["frame_psnr_db"] == pytest.approx(frame_psnr(own, twin))
        assert one["worst_psnr_db"] == min(one["frame_psnr_db"]) == one["frame_psnr_db"][one["worst_frame"]]
        assert one["lpips"] is not None or one["lpips_missing"].startswith("not run: ")
    text = (tmp_path / "report" / "index.html").read_text()
    lows = {one["name"]: one["worst_psnr_db"] for one in told["clips"]}
    shown = re.findall(r"<option value=\"\d\">([\w.-]+) \(worst frame", text)
    assert shown == sorted(lows, key=lows.__getitem__) and "a red star (seed 8)" in text
    average = np.mean([one["psnr_db"] for one in told["clips"]])
    assert text.count("<video") == 6 and f"PSNR of wan21-fast to dense: {average:.1f} dB on average" in text
    for word in ("Amdahl", "Memory", "Fall-backs"):  # what only a bench can tell
        assert word not in text
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["index.html"]


def test_two_folders(call: Callable[..., Told], clips: tuple, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "a" / "still.png", tmp_path / "a" / "alone.png")
    code, out, err = call("compare", "a", "b", "--labels", "dense, fast")
    assert code == 0 and "in one folder only, left out: alone.png" in err
    dense, fast = clips
    rows = {line.split()[1]: line for line in out.splitlines() if (".gif" in line and "│" in line) or "still" in line}
    assert f"{psnr(fast, dense):.2f}" in rows["moving.gif"] and "equal" in rows["still.png"]
    last = out.strip().splitlines()[-1]
    worst = frame_psnr(fast, dense)[2]
    assert last == (
        f"PSNR of fast to dense: {psnr(fast, dense):.1f} dB on average over the 1 clip that differs (1 is equal), "
        f"{worst:.1f} dB in the worst frame (2 of moving.gif)."
    )
    assert "LPIPS not run" in err or "lpips" in sys.modules


def test_two_files_and_a_page_of_its_own_name(call: Callable[..., Told], clips: tuple, tmp_path: Path) -> None:
    words = ("compare", "a/moving.gif", "b/moving.gif", "--out", "pages/one.html")
    code, out, err = call(*words)
    assert code == 0 and out.strip().splitlines()[-1] == "pages/one.html"
    assert f"{frame_psnr(clips[1], clips[0])[2]:.1f} dB in the worst frame (2 of moving.gif)" in out
    assert "a/moving.gif" in out  # two equal names: their folders tell them apart
    assert call(*words)[0] == 0, "a page of ours may be replaced"
    (tmp_path / "pages" / "one.html").write_text("<p>mine</p>")
    code, out, err = call(*words)
    assert code == 2 and "is no page of dit-accel" in err
    assert (tmp_path / "pages" / "one.html").read_text() == "<p>mine</p>"


def test_images(call: Callable[..., Told], clips: tuple, tmp_path: Path) -> None:
    write_clip(tmp_path / "c.png", clips[1][2:3], 0)
    code, out, err = call("compare", "a/still.png", "c.png", "--out", "p.html")
    assert code == 0, err
    text = (tmp_path / "p.html").read_text()
    assert "<video" not in text and text.count('src="data:image/png') == 3 and 'class="controls"' not in text
    code, out, _ = call("compare", "a/still.png", "b/still.png")
    assert code == 0 and "still.png equals a/still.png in the clip, pixel for pixel" in out


CASES = {
    "one side alone": (("a/moving.gif",), "against what?"),
    "nothing there": (("a/moving.gif", "none.gif"), "none.gif does not exist"),
    "a file and a folder": (("a/moving.gif", "b"), "two files or two folders"),
    "other sizes": (("a/moving.gif", "small.gif"), "a/moving.gif is 4 frames of 48x32, small.gif is 4 frames of 24x32"),
    "other lengths": (("a/moving.gif", "a/still.png"), "4 frames of 48x32, a/still.png is 1 frame of 48x32"),
    "no clip": (("a/moving.gif", "notes.txt"), "Allowed: .avi"),
    "a broken clip": (("a/moving.gif", "broken.mp4"), "cannot read broken.mp4"),
    "no equal names": (("a", "empty"), "no clips of equal names"),
    "a record and more": (("run.json", "a"), "leave a out"),
    "no record": (("other.json",), "no run.json of dit-accel"),
    "a record without twins": (("run.json",), "--compare-dense"),
    "one label": (("a", "b", "--labels", "dense"), "two different names"),
    "a page that is no page": (("a", "b", "--out", "notes.txt"), "name a folder, or a file that ends in .html"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_errors(name: str, call: Callable[..., Told], clips: tuple, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for file, text in (("notes.txt", "x"), ("broken.mp4", "x"), ("other.json", "{}")):
        (tmp_path / file).write_text(text)
    (tmp_path / "run.json").write_text(json.dumps({"tool": "dit_accel", "preset": {"name": "x"}, "clips": []}))
    write_clip(tmp_path / "small.gif", clips[0][:, :, :24], 10)
    before = sorted(tmp_path.rglob("*"))
    words, message = CASES[name]
    code, out, err = call("compare", *words)
    assert code == 2 and message in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_needs_matplotlib(call: Callable[..., Told], clips: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call("compare", "a", "b", "--out", "p")
    assert code == 3 and err.count("\n") == 1 and "pip install 'dit-accel[report]'" in err
    assert call("compare", "a", "b", "--json")[0] == 0, "figures need none"
