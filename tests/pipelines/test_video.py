"""Clips: every format is reopened and compared; nothing half-written is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.pipelines.video import check_writable, read_clip, write_clip

COMMENT = '{"prompt": "ein größerer Stern", "n": [1, 2]}' + " " * 4000


def clip(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    """A white disc moving over a grey ramp: even colours, so that 4:2:0 costs little."""
    y, x = np.mgrid[:height, :width]
    ramp = (x * 2 + y).astype(np.uint8)
    shots = [np.where((x - 10 - 4 * t) ** 2 + (y - 24) ** 2 < 64, 255, ramp) for t in range(frames)]
    return np.repeat(np.stack(shots)[..., None], 3, axis=-1).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def test_mp4(tmp_path: Path) -> None:
    frames = clip()
    assert write_clip(tmp_path / "a.mp4", frames, 16, COMMENT) == [tmp_path / "a.mp4"]
    back, fps, comment = read_clip(tmp_path / "a.mp4")
    assert back.shape == frames.shape and fps == 16 and comment == COMMENT
    assert psnr(back, frames) > 38
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_equal_frames_give_equal_files_whatever_was_in_memory(tmp_path: Path) -> None:
    """glibc fills every new piece of memory with the number in MALLOC_PERTURB_."""
    code = (
        "import numpy as np; from pathlib import Path; from dit_accel.pipelines.video import write_clip\n"
        "wave = 127 + 100 * np.sin(np.arange(5 * 64 * 64 * 3).reshape(5, 64, 64, 3) / 700)\n"
        "write_clip(Path('a.mp4'), wave.astype(np.uint8), 16)"
    )
    files = set()
    for filling in "1", "85", "170":
        command = [sys.executable, "-P", "-c", code]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "MALLOC_PERTURB_": filling}, check=True)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_mp4_with_odd_sides_and_a_broken_rate(tmp_path: Path) -> None:
    frames = clip(height=33, width=35)
    write_clip(tmp_path / "a.mp4", frames, 23.976, None)
    back, fps, comment = read_clip(tmp_path / "a.mp4")
    assert back.shape == frames.shape and abs(fps - 23.976) < 0.01 and comment is None


def test_gif(tmp_path: Path) -> None:
    frames = clip()
    write_clip(tmp_path / "a.gif", frames, 10, COMMENT)
    back, fps, comment = read_clip(tmp_path / "a.gif")
    assert back.shape == frames.shape and fps == 10 and comment == COMMENT
    assert psnr(back, frames) > 35


def test_png_frames_are_lossless(tmp_path: Path) -> None:
    frames = clip(frames=3)
    files = write_clip(tmp_path / "deep" / "a.png", frames, 10, COMMENT)
    assert [file.name for file in files] == ["a-0001.png", "a-0002.png", "a-0003.png"]
    for file, frame in zip(files, frames, strict=True):
        back, _, comment = read_clip(file)
        assert np.array_equal(back[0], frame) and comment == COMMENT


def test_one_png_keeps_its_name(tmp_path: Path) -> None:
    assert write_clip(tmp_path / "a.png", clip(frames=1), 10) == [tmp_path / "a.png"]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"before")
    with pytest.raises(Exception, match=r".*"):
        write_clip(path, np.zeros((2, 16, 16, 7), np.uint8), 16)
    assert [p.name for p in tmp_path.iterdir()] == [name] and path.read_bytes() == b"before"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        check_writable(tmp_path / "file" / "a.mp4")
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        write_clip(tmp_path / "file" / "a.mp4", clip(), 16)


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deeper" / "a.mp4")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="it is a folder"):
        (tmp_path / "b.mp4").mkdir()
        check_writable(tmp_path / "b.mp4")
    with pytest.raises(UsageError, match=r"Allowed: \.gif, \.mp4, \.png"):
        check_writable(tmp_path / "a.avi")
