"""Clips as data: URIs that every browser plays, and the picture of their difference."""

from __future__ import annotations

import base64
import io
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_accel.errors import UsageError
from dit_accel.pipelines.video import write_clip
from dit_accel.quality.page.drawing import colour_map

_SIDE = 384  # frames whose shorter side is smaller are enlarged by a whole factor to at least this
_GAINS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Difference:
    """Where two clips differ: frames in colours uint8 `[F, H, W, 3]`, and by what the difference was amplified."""

    frames: np.ndarray
    gain: int


def draw_difference(reference: np.ndarray, other: np.ndarray) -> Difference:
    """Mean absolute difference of the channels, as colours from dark (none) to light.

    The gain is the largest power of two up to 64 at which a two-hundredth of the pixels, or fewer, leave the scale.
    """
    if reference.shape != other.shape:
        raise UsageError(f"clips to compare are of one shape, not {list(reference.shape)} and {list(other.shape)}")
    apart = np.abs(reference.astype(np.int16) - other).mean(-1)  # [F, H, W], 0..255
    high = float(np.quantile(apart, 0.995))
    gain = max((gain for gain in _GAINS if gain * high <= 255), default=1)
    levels = (apart * gain).clip(0, 255).round().astype(np.uint8)
    return Difference(colour_map()[levels], gain)


def embed(frames: np.ndarray, fps: float, poster: int) -> tuple[str, str, int, int]:
    """A clip inside the page: H.264 4:2:0 in MP4, which every browser plays; one frame alone as PNG.

    Small frames are enlarged by whole factors, so that a pixel stays a square.

    Args:
        frames: uint8 `[F, H, W, 3]`.
        poster: the frame shown before it plays.

    Returns:
        Its data: URI, its poster's (empty for an image), its width and height in pixels.
    """
    frames = _enlarge(frames)
    height, width = frames.shape[1:3]
    if len(frames) == 1:
        return _picture(frames[0], "PNG"), "", width, height
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, frames, fps)
        return _uri("video/mp4", path.read_bytes()), _picture(frames[poster], "JPEG"), width, height


def embed_picture(path: Path) -> str:
    """A PNG file as a data: URI."""
    return _uri("image/png", path.read_bytes())


def _enlarge(frames: np.ndarray) -> np.ndarray:
    """By a whole factor; odd sides grow by one row or column of their own, since 4:2:0 needs even ones."""
    factor = max(1, math.ceil(_SIDE / min(frames.shape[1:3])))
    frames = frames.repeat(factor, 1).repeat(factor, 2)
    odd = [(0, side % 2) for side in frames.shape[1:3]]
    return np.pad(frames, [(0, 0), *odd, (0, 0)], mode="edge")


def _picture(frame: np.ndarray, form: str) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(data, format=form)
    return _uri(f"image/{form.lower()}", data.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
