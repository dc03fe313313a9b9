"""Compare a fast clip with its dense reference: figures, and a picture that shows the difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_accel.errors import UsageError
from dit_accel.quality.metrics import Clip, flicker, flicker_error, frame_psnr, frame_ssim, psnr

if TYPE_CHECKING:
    from PIL import Image

_LABEL = 14  # height of a line of labels, pixels
_SMALLEST_TILE = 96  # tiny frames are enlarged by whole factors to at least this height


@dataclass(frozen=True)
class Comparison:
    """How far a clip is from its reference. PSNR in dB, infinite where equal; SSIM in [-1, 1]."""

    psnr: float  # of the whole clip
    worst_frame: int  # counted from 0
    worst_psnr: float
    ssim: float
    worst_ssim: float
    flicker: float  # temporal change over the reference's, 1 is equal
    flicker_error: float  # RMS difference of temporal changes, 0 is equal

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: infinite and undefined values become None."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()
        }

    def __str__(self) -> str:
        if math.isinf(self.psnr):
            return "equal to dense, pixel for pixel"
        return (
            f"PSNR {self.psnr:.1f} dB (worst frame {self.worst_frame}: {self.worst_psnr:.1f} dB), "
            f"SSIM {self.ssim:.3f}, temporal change {self.flicker:.2f} x dense"
        )


def compare_clips(reference: Clip, fast: Clip) -> Comparison:
    """Measure `fast` against `reference`, both uint8 (or both float in [0, 1]) `[F, H, W, 3]`, where they are.

    Raises:
        UsageError: for clips that differ in shape, kind or device.
    """
    frames, likeness = frame_psnr(fast, reference), frame_ssim(fast, reference)
    worst = min(range(len(frames)), key=frames.__getitem__)
    return Comparison(
        psnr=psnr(fast, reference),
        worst_frame=worst,
        worst_psnr=frames[worst],
        ssim=float(np.mean(likeness)),
        worst_ssim=min(likeness),
        flicker=flicker(fast, reference),
        flicker_error=flicker_error(fast, reference),
    )


def draw_comparison(
    reference: np.ndarray, fast: np.ndarray, *, columns: int = 6, gain: float = 4.0
) -> Image.Image:
    """Evenly spaced frames in three rows: dense, fast, and their absolute difference times `gain`.

    The fast clip's worst frame replaces the evenly spaced frame nearest to it, so that the picture never hides it.
    """
    if reference.dtype != np.uint8 or fast.dtype != np.uint8:
        raise UsageError(f"a comparison picture needs uint8 clips, not {reference.dtype} and {fast.dtype}")
    values = frame_psnr(fast, reference)
    worst = min(range(len(values)), key=values.__getitem__)
    chosen = spread_frames(len(reference), columns)
    nearest = min(range(len(chosen)), key=lambda i: abs(chosen[i] - worst))
    chosen[nearest] = worst
    apart = np.abs(reference[chosen].astype(np.float32) - fast[chosen]) * gain
    rows = {
        "dense": reference[chosen],
        "fast": fast[chosen],
        f"difference x {gain:g}": apart.clip(0, 255).astype(np.uint8),
    }
    names = [f"frame {i}" + (" (worst)" if i == worst else "") for i in chosen]
    return draw_sheet(rows, names)


def save_comparison(path: Path, reference: np.ndarray, fast: np.ndarray, **options: Any) -> None:
    """Write `draw_comparison` as PNG."""
    draw_comparison(reference, fast, **options).save(path, format="PNG")


def draw_sheet(rows: Mapping[str, np.ndarray], columns: list[str]) -> Image.Image:
    """A contact sheet: one labelled row of uint8 frames `[N, H, W, 3]` for each entry, one label for each column."""
    from PIL import Image, ImageDraw

    height, width = next(iter(rows.values())).shape[1:3]
    enlarge = max(1, math.ceil(_SMALLEST_TILE / height))
    height, width = height * enlarge, width * enlarge
    sheet = Image.new("RGB", (len(columns) * (width + 2), _LABEL + len(rows) * (_LABEL + height)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        pen.text((i * (width + 2) + 2, 1), name, fill="black")
    for n, (name, frames) in enumerate(rows.items()):
        top = _LABEL + n * (_LABEL + height)
        pen.text((2, top + 1), name, fill="black")
        for i, frame in enumerate(frames):
            tile = Image.fromarray(np.ascontiguousarray(frame)).resize(
                (width, height), Image.Resampling.NEAREST
            )
            sheet.paste(tile, (i * (width + 2), top + _LABEL))
    return sheet


def spread_frames(frames: int, columns: int) -> list[int]:
    """Indices of at most `columns` evenly spaced frames, first and last included."""
    return sorted({round(float(i)) for i in np.linspace(0, frames - 1, min(columns, frames))})
