"""Distances of a clip from its reference, and the uncertainty of a share.

Clips are `[F, H, W, C]`, uint8 in 0..255 or float in [0, 1], numpy or torch, both of one kind and on one device. All
arithmetic runs in float64 where they are. PSNR and SSIM follow the usual definitions with a peak of 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dit_accel.errors import UsageError

Clip = np.ndarray | Tensor


def psnr(clip: Clip, reference: Clip, mask: Clip | None = None) -> float:
    """Peak signal-to-noise ratio of the whole clip in dB: 0 upwards, infinite for equal clips.

    The squared error is averaged over all frames before the logarithm; a mean of per-frame values would be higher.

    Args:
        mask: `[F, H, W]` weights in [0, 1]: the error is averaged inside it only.

    Raises:
        UsageError: shapes or kinds that do not fit, or an empty mask.
    """
    error = _squared_error(clip, reference)
    if mask is None:
        return _decibel(float(error.mean()))
    weight = torch.as_tensor(mask).to(error)
    if weight.shape != error.shape or not float(weight.sum()) > 0:
        raise UsageError(f"a mask must be {list(error.shape)} and not empty, not {list(weight.shape)}")
    return _decibel(float((error * weight).sum() / weight.sum()))


def frame_psnr(clip: Clip, reference: Clip) -> list[float]:
    """PSNR of every frame in dB. The worst frame is the smallest."""
    return [_decibel(float(e)) for e in _squared_error(clip, reference).mean((1, 2))]


def ssim(clip: Clip, reference: Clip) -> float:
    """Structural similarity in [-1, 1], 1 for equal clips: mean over positions, channels and frames."""
    return float(np.mean(frame_ssim(clip, reference)))


def frame_ssim(clip: Clip, reference: Clip) -> list[float]:
    """Structural similarity of every frame, where the whole 11x11 window lies inside the frame.

    Source: Wang et al., "Image quality assessment", 2004: Gaussian window of 1.5 pixels, K1 = .01, K2 = .03.
    """
    a, b = (x.permute(0, 3, 1, 2) for x in _as_pair(clip, reference))
    if min(a.shape[-2:]) < 11:
        raise UsageError(f"SSIM needs frames of 11x11 pixels or more, not {a.shape[-1]}x{a.shape[-2]}")
    down, across = (_gaussian(length, a.device) for length in a.shape[-2:])
    values = []
    for x, y in zip(
        a, b, strict=True
    ):  # one frame at a time: a large clip in float64 would not fit five times
        planes = torch.cat([x, y, x * x, y * y, x * y])
        mx, my, xx, yy, xy = (down.T @ planes @ across).chunk(5)
        vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
        likeness = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
        values.append(float((likeness / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))).mean()))
    return values


def _gaussian(length: int, device: torch.device) -> Tensor:
    """The window's weights as a band, float64 `[length, length - 10]`: a product is far faster than a convolution."""
    offset = torch.arange(length, device=device)[:, None] - torch.arange(length - 10, device=device)
    weight = torch.exp(-0.5 * ((offset - 5).double() / 1.5) ** 2) * ((offset >= 0) & (offset <= 10))
    return weight / weight.sum(0)


def flicker(clip: Clip, reference: Clip) -> float:
    """How much more the clip changes from frame to frame than its reference: a ratio of energies, 0 upwards.

    1 means equally lively, 1.1 ten per cent more temporal change (flicker), below 1 frozen or blurred motion.
    NaN when the reference does not change at all and the clip does not either.
    """
    a, b = _as_pair(clip, reference)
    energy, expected = (float((x[1:] - x[:-1]).square().sum()) for x in (a, b))
    if expected == 0:
        return math.nan if energy == 0 else math.inf
    return energy / expected


def flicker_error(clip: Clip, reference: Clip) -> float:
    """Root mean square of the difference of the two clips' frame-to-frame differences, 0 (equal) to 2."""
    a, b = _as_pair(clip, reference)
    if len(a) < 2:
        return 0.0
    difference = a - b
    return float((difference[1:] - difference[:-1]).square().mean().sqrt())


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval that holds a true share with 95 % confidence, given `successes` of `n`.

    Unlike the normal interval it stays inside [0, 1] and has a width at 0 of n and n of n.

    Raises:
        UsageError: for n < 1 or successes outside 0..n.

    Source: Wilson, "Probable inference", 1927.
    """
    if n < 1 or not 0 <= successes <= n:
        raise UsageError(f"{successes} of {n} is no share: give 0 <= successes <= n and n >= 1")
    share = successes / n
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _squared_error(clip: Clip, reference: Clip) -> Tensor:
    """Mean over channels of the squared error, float64 `[F, H, W]`."""
    a, b = _as_pair(clip, reference)
    return (a - b).square().mean(-1)


def _as_pair(clip: Clip, reference: Clip) -> tuple[Tensor, Tensor]:
    a, b = torch.as_tensor(clip).detach(), torch.as_tensor(reference).detach()
    if a.ndim != 4 or a.shape != b.shape:
        raise UsageError(
            "clips to compare are [frames, height, width, channels] of one shape, "
            f"not {list(a.shape)} and {list(b.shape)}"
        )
    if a.device != b.device:
        raise UsageError(f"clips to compare are on one device, not on {a.device} and {b.device}")
    if (a.dtype == torch.uint8) != (b.dtype == torch.uint8):
        raise UsageError(f"clips to compare are both uint8 or both float, not {a.dtype} and {b.dtype}")
    scale = 255.0 if a.dtype == torch.uint8 else 1.0
    return a.double() / scale, b.double() / scale


def _decibel(squared_error: float) -> float:
    return -10 * math.log10(squared_error) if squared_error > 0 else math.inf
