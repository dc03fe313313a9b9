"""`dit-accel generate` where a picture goes in or comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_accel.cli.app import run
from dit_accel.pipelines import flux
from dit_accel.pipelines.video import read_clip
from dit_accel.preset import GenerateOptions

FLUX = ("generate", "--preset", "flux-fast", "--size", "96x64", "--steps", "2", "--seed", "7")
SPARSE = ("--set", "block=16", "--set", "min_tokens=0", "--set", "dense_above=1.0", "--set", "dense_first=0.0")
I2V = (
    "generate",
    "--preset",
    "wan22-i2v-fast",
    "--frames",
    "5",
    "--steps",
    "2",
    "--seed",
    "7",
    "--prompt",
    "x",
)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A picture three times as wide as high."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def test_images_of_several_prompts_and_seeds(cli: Callable, flux_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    many = ("--prompts-file", "prompts.txt", "--count", "2", "--compare-dense", "-o", "out/")
    done = cli(*FLUX, *SPARSE, *many, "--model", flux_folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [f"flux-fast-{seed}-{n:04d}.png" for n in (1, 2) for seed in (7, 8)]
    assert done.stdout.split() == [f"out/{name}" for name in names]
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == sorted([*names, *(name.replace(".png", "-dense.png") for name in names), "run.json"])
    assert "seeds 7 to 8" in done.stderr and "provisional" in done.stderr

    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [(clip["prompt"], clip["seed"]) for clip in record["clips"]] == [
        ("a red star", 7), ("a red star", 8), ("a blue circle", 7), ("a blue circle", 8),
    ]  # fmt: skip
    images = [read_clip(tmp_path / "out" / name) for name in names]
    for clip, (frames, _, comment) in zip(record["clips"], images, strict=True):
        assert clip["frames"] == [1, 64, 96, 3] and frames.shape == (1, 64, 96, 3)
        # two steps of one dual and two single blocks, one branch
        assert clip["report"]["self_attention_calls"] == {"sparse": 6, "linear": 0, "dense": 0}
        assert clip["report"]["fallbacks"] == {} and clip["dense"]["psnr_db"] > 5
        inside = json.loads(comment)
        assert (inside["prompt"], inside["seed"]) == (clip["prompt"], clip["seed"])
    assert len({frames.tobytes() for frames, _, _ in images}) == 4

    # any of them can be made alone
    options = GenerateOptions(width=96, height=64, frames=1, steps=2, guidance=3.5)
    alone = flux.generate(flux.load(flux_folder), options, "a blue circle", seed=8)
    assert np.array_equal(alone, read_clip(tmp_path / "out" / "flux-fast-8-0002-dense.png")[0])


def test_the_shipped_image_model(cli: Callable, tmp_path: Path) -> None:
    """tiny-sd3-fast as it is but for the steps: two of the twenty, of which the noisiest is dense."""
    words = ("--prompt", "a red ring and a blue square over a striped background", "--steps", "2", "--seed", "7")
    done = cli(
        "generate", "--preset", "tiny-sd3-fast", *words, "--compare-dense", "--strict", "-o", "a.png", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a.png\n" and "provisional" not in done.stderr
    assert "preset tiny-sd3-fast · tiny-sd3 · seed 7" in done.stderr and "s dense (" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-dense.png", "a.png", "run.json"]
    fast, dense = (read_clip(tmp_path / name)[0] for name in ("a.png", "a-dense.png"))
    assert fast.shape == dense.shape == (1, 256, 256, 3) and not np.array_equal(fast, dense)
    (clip,) = json.loads((tmp_path / "run.json").read_text())["clips"]
    # one step of five layers each, both branches of guidance in one batch
    assert clip["report"]["self_attention_calls"] == {"sparse": 5, "linear": 0, "dense": 5}
    assert 0.3 < clip["report"]["keep"]["achieved"] < 0.5 and clip["report"]["fallbacks"] == {}


def test_a_video_from_a_picture(cli: Callable, wan22_i2v_folder: Path, first: Path, tmp_path: Path) -> None:
    model = ("--model", wan22_i2v_folder, "--image", "first.png")
    done = cli(*I2V, *SPARSE, *model, "--size", "64x48", "-o", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "56% of first.png are cut off: it is 120x40, the video 64x48" in done.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["image"] == {"path": "first.png", "size": [120, 40]}
    (clip,) = record["clips"]
    assert clip["frames"] == [5, 48, 64, 3]
    # 2 steps x 2 branches x 4 layers, of which the preset keeps the first two dense
    assert clip["report"]["self_attention_calls"] == {"sparse": 8, "linear": 0, "dense": 8}
    assert clip["report"]["fallbacks"] == {}
    assert len(clip["files"]) == 5 and clip["files"][0] == "a-0001.png"


def test_what_an_image_reads(cli: Callable, flux_folder: Path, tmp_path: Path) -> None:
    words = ("--preset", "flux-fast", "--size", "96x64", "--steps", "2", "--seed", "7", "--prompt", "x")
    done = cli("inspect", *words, *SPARSE, "--model", flux_folder, "-o", "seen", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "provisional" in done.stderr
    assert {"image.png", "inspect.json", "keep.png", "recall.png"} <= {
        p.name for p in (tmp_path / "seen").iterdir()
    }
    assert json.loads((tmp_path / "seen" / "inspect.json").read_text())["complete"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable:
    """Run a command that ends before torch: exit code, stdout, stderr; the folder holds what it held before."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("COLUMNS", "160")
        before = sorted(tmp_path.rglob("*"))
        code = run([str(word) for word in arguments])
        assert sorted(tmp_path.rglob("*")) == before
        return code, *capsys.readouterr()

    return call


def test_without_a_size_the_video_has_the_pictures_shape(
    told: Callable, wan22_i2v_folder: Path, first: Path
) -> None:
    code, out, err = told(*I2V, "--model", wan22_i2v_folder, "--image", first, "--dry-run", "--json")
    assert code == 0, err
    preset = json.loads(out)["preset"]
    width, height = preset["generate"]["width"], preset["generate"]["height"]
    assert width % 16 == height % 16 == 0 and width / height == pytest.approx(3, rel=0.05)
    assert 0.9 < width * height / (1280 * 720) <= 1
    assert preset["sources"]["generate.width"] == preset["sources"]["generate.height"] == "image"
    code, out, _ = told(*I2V, "--model", wan22_i2v_folder, "--image", first, "--dry-run", "--size", "64x48")
    assert code == 0 and "first.png (120x40)" in out and "count" not in out
    one_side = ("--set", "generate.height=704", "--dry-run", "--json")
    code, out, _ = told(*I2V, "--model", wan22_i2v_folder, "--image", first, *one_side)
    generate = json.loads(out)["preset"]["generate"]
    assert code == 0 and (generate["width"], generate["height"]) == (1280, 704)


def test_a_dry_run_says_what_it_could_not_check(told: Callable, first: Path) -> None:
    code, out, err = told(*I2V, "--image", first, "--dry-run")
    assert code == 0 and "sizes and --image are checked once the model is there" in err
    assert "provisional" in out


CASES = {
    "a model that begins at a picture": (I2V, "give --image FILE"),
    "no such picture": ((*I2V, "--image", "none.png"), "cannot read picture none.png"),
    "no picture": ((*I2V, "--image", "prompt.txt"), "prompt.txt is no picture"),
    "a size it cannot make": ((*I2V, "--image", "first.png", "--size", "70x48"), "the nearest is 64x48"),
    "no count": ((*I2V, "--image", "first.png", "--count", "0"), "--count 0: at least 1"),
    "an image as a video": ((*FLUX, "--prompt", "x", "-o", "a.mp4"), "Allowed: .png"),
    "frames of an image": ((*FLUX, "--prompt", "x", "--frames", "5"), "makes single images"),
    "an image from a picture": ((*FLUX, "--prompt", "x", "--image", "first.png"), "starts from text alone"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_errors(
    name: str, told: Callable, wan22_i2v_folder: Path, flux_folder: Path, first: Path
) -> None:
    arguments, message = CASES[name]
    (first.parent / "prompt.txt").write_text("a red star")
    model = flux_folder if "flux-fast" in arguments else wan22_i2v_folder
    code, out, err = told(*arguments, "--model", model)
    assert code == 2 and message in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and out == ""


def test_text_to_video_takes_no_picture(told: Callable, wan21_folder: Path, first: Path) -> None:
    words = ("generate", "--preset", "wan21-fast", "--prompt", "x", "--model", wan21_folder, "--image", first)
    code, _, err = told(*words)
    assert code == 2 and "starts from text alone; leave it out, or choose a model of image to video" in err
