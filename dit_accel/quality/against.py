"""One clip against its reference, as results.json and the page tell it: `Quality`, with JSON's None for infinity."""

from __future__ import annotations

import math

import numpy as np

from dit_accel.bench.results import Quality
from dit_accel.quality.metrics import flicker, flicker_error, frame_psnr, frame_ssim, psnr
from dit_accel.quality.perceptual import Lpips

_WINDOW = 11  # pixels: SSIM's


def measure_quality(clip: np.ndarray, reference: np.ndarray, lpips: Lpips | str) -> Quality:
    """Every distance of a clip from its reference.

    Args:
        clip: uint8 `[F, H, W, 3]`.
        reference: the same.
        lpips: what `open_lpips` gave.

    Raises:
        UsageError: clips of unequal shape.
    """
    frames = frame_psnr(clip, reference)
    worst = min(range(len(frames)), key=frames.__getitem__)
    wide = min(clip.shape[1:3]) >= _WINDOW
    missing = lpips if isinstance(lpips, str) else None
    return Quality(
        equal=bool(np.array_equal(clip, reference)),
        psnr_db=_finite(psnr(clip, reference)),
        ssim=float(np.mean(frame_ssim(clip, reference))) if wide else None,
        worst_frame=worst,
        worst_psnr_db=_finite(frames[worst]),
        frame_psnr_db=tuple(_finite(value) for value in frames),
        flicker=_finite(flicker(clip, reference)) if len(clip) > 1 else None,
        flicker_error=flicker_error(clip, reference),
        lpips=None if missing else lpips(clip, reference),
        lpips_missing=missing,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
