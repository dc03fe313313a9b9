"""The picture at which a video begins: read whole or refused in one line, and brought to size without stretching it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_accel.errors import UsageError
from dit_accel.pipelines.limits import SizeRule
from dit_accel.pipelines.pictures import fit_picture, open_picture, share_cut


def halves(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def test_a_picture_comes_as_rgb_and_upright(tmp_path: Path) -> None:
    image = halves(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: turn it by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = open_picture(tmp_path / "turned.jpg")
    assert turned.size == (20, 40) and turned.mode == "RGB"
    image.convert("P").save(tmp_path / "palette.png")
    assert open_picture(tmp_path / "palette.png").getpixel((0, 0)) == (255, 0, 0)


def test_it_is_scaled_and_cut_evenly_not_stretched() -> None:
    fitted = fit_picture(halves(100, 20), 32, 16)
    pixels = np.asarray(fitted)
    assert pixels.shape == (16, 32, 3)
    assert pixels[8, 0].tolist() == [255, 0, 0] and pixels[8, -1].tolist() == [0, 0, 255]
    # the edge between the halves stays in the middle
    assert pixels[8, 13, 0] > 200 and pixels[8, 18, 2] > 200
    assert share_cut(halves(100, 20), 32, 16) == pytest.approx(0.6)
    assert share_cut(halves(64, 32), 32, 16) == 0


@pytest.mark.parametrize(
    ("picture", "area", "size"),
    [
        ((1600, 900), 832 * 480, (832, 464)),
        ((900, 1600), 832 * 480, (464, 832)),
        ((9000, 9), 832 * 480, (19984, 16)),
    ],
)
def test_a_size_in_the_shape_of_a_picture(picture: tuple, area: int, size: tuple) -> None:
    rule = SizeRule(16, 16, 4)
    assert rule.in_shape(*picture, area) == size
    rule.check(*size, 5)


@pytest.mark.parametrize("content", [None, b"", b"no picture", "cut"])
def test_what_is_no_picture_is_refused_in_one_line(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    if content == "cut":
        halves(400, 200).save(path)
        content = path.read_bytes()[:200]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="first.png") as caught:
        open_picture(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot read picture"):
        open_picture(tmp_path)
