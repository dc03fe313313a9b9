"""Read the picture at which a video begins, and bring it to the video's size. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


def open_picture(path: Path) -> Image:
    """A picture as RGB, upright as its camera meant it.

    Raises:
        UsageError: no such file, or no picture, or a picture that is cut short.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UsageError(f"cannot read picture {path}: {error.strerror}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{path} is no picture that can be read ({error}); give a whole PNG, JPEG or WebP"
        ) from None


def fit_picture(image: Image, width: int, height: int) -> Image:
    """A picture of exactly this size: scaled until it covers it, and cut evenly at the sides that stand over.

    The pipelines would stretch it.
    """
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def share_cut(image: Image, width: int, height: int) -> float:
    """The share of a picture that `fit_picture` cuts off, from 0."""
    ours, theirs = image.width / image.height, width / height
    return 1 - min(ours, theirs) / max(ours, theirs)
