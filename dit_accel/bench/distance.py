"""How far a clip is from its dense twin, as `results.Quality`."""

from __future__ import annotations

import math

import numpy as np

from dit_accel.bench.results import Quality
from dit_accel.quality.compare import compare_clips
from dit_accel.quality.metrics import frame_psnr

NO_LPIPS = "it needs a pretrained network, which does not ship with dit_accel"


def distance(dense: np.ndarray, clip: np.ndarray) -> Quality:
    """Measure uint8 `[F, H, W, 3]` against dense of the same prompt and seed."""
    told = compare_clips(dense, clip)
    frames = [_finite(value) for value in frame_psnr(clip, dense)]
    return Quality(
        equal=math.isinf(told.psnr),
        psnr_db=_finite(told.psnr),
        ssim=told.ssim,
        worst_frame=told.worst_frame,
        worst_psnr_db=_finite(told.worst_psnr),
        frame_psnr_db=tuple(frames),
        flicker=_finite(told.flicker) if len(dense) > 1 else None,
        flicker_error=told.flicker_error,
        lpips=None,
        lpips_missing=NO_LPIPS,
    )


def _finite(value: float) -> float | None:
    """The value; None where JSON has no word for it."""
    return value if math.isfinite(value) else None
