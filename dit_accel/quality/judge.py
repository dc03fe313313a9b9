"""An analytic judge: reads colours, shapes, motions and background out of a clip or an image, not seeing the prompt.

Nothing in it is learned. It knows the vocabulary and the closed forms of `scenes` and is tested on rendered scenes,
also blurred, noisy, compressed and after a VAE (`scripts/measure_judge.py` prints its confusion matrices).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.quality.captions import expected_from_scene, read_caption
from dit_accel.quality.find_objects import Track, find_tracks, measure_cover
from dit_accel.quality.read_background import read_background
from dit_accel.quality.read_motion import read_motion
from dit_accel.quality.read_shape import Templates, draw_templates, read_shape
from dit_accel.quality.readings import AttributeMatch, Expectation, ObjectReading, Reading, matches
from dit_accel.quality.scenes import STILL

__all__ = [
    "AttributeMatch",
    "Expectation",
    "ObjectReading",
    "Reading",
    "expected_from_scene",
    "judge_clip",
    "judge_image",
    "matches",
    "read_caption",
]

_SHORT_SIDE = 128  # everything is judged at this size, so one set of thresholds serves all sizes


def judge_clip(frames: np.ndarray | Tensor) -> Reading:
    """Read a clip.

    Args:
        frames: `[F, H, W, 3]`, uint8 in 0..255 or float in [0, 1]; at least 5 frames, or no motion can be read.

    Raises:
        UsageError: for another shape or dtype, or values that are not finite.
    """
    clip = torch.as_tensor(frames).detach().cpu()
    if clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) < 5:
        raise UsageError(
            f"a clip to judge is [frames, height, width, 3] with 5 frames or more, not {list(clip.shape)}"
        )
    return _read(_prepare(clip, "a clip"))


def judge_image(pixels: np.ndarray | Tensor) -> Reading:
    """Read an image: every object's motion is `STILL`, nothing pans.

    Args:
        pixels: `[H, W, 3]`, uint8 in 0..255 or float in [0, 1].

    Raises:
        UsageError: for another shape or dtype, or values that are not finite.
    """
    image = torch.as_tensor(pixels).detach().cpu()
    if image.ndim != 3 or image.shape[-1] != 3:
        raise UsageError(f"an image to judge is [height, width, 3], not {list(image.shape)}")
    return _read(_prepare(image[None], "an image"))


def _read(clip: Tensor) -> Reading:
    time = torch.linspace(0, 1, len(clip))
    cover = measure_cover(clip)
    templates = draw_templates()
    objects = tuple(_read_object(track, templates, time) for track in find_tracks(cover))
    background, pan = read_background(clip, cover.sum(0))
    return Reading(objects, background, pan)


def _read_object(track: Track, templates: Templates, time: Tensor) -> ObjectReading:
    short = min(track.cover.shape[1:])
    form = read_shape(track, templates, time)
    centre, radius = track.centre / short, form.radius / short
    seen = track.seen
    motion, growth = STILL, 1.0
    if len(time) > 1:
        growth = _measure_growth(radius[seen], time[seen])
        motion = read_motion(centre[seen], time[seen], growth, form.turns)
    return ObjectReading(
        colour=track.colour,
        shape=form.shape,
        motion=motion,
        centres=tuple((float(x), float(y)) for x, y in centre),
        radii=tuple(map(float, radius)),
        presence=float(seen.float().mean()),
        fit=form.fit,
        turns=form.turns,
        growth=growth,
    )


def _measure_growth(radius: Tensor, time: Tensor) -> float:
    """Last radius over first, from a straight line through all frames."""
    centred = time - time.mean()
    slope = (radius * centred).sum() / centred.square().sum()
    first, last = (radius.mean() + slope * (t - time.mean()) for t in (0.0, 1.0))
    return float(last / first.clamp_min(1e-3))


def _prepare(clip: Tensor, kind: str) -> Tensor:
    """fp32 `[F, 3, H, W]` in [0, 1] with a shorter side of 128, from `[F, H, W, 3]`. `kind` is for messages."""
    if clip.dtype == torch.uint8:
        clip = clip.float() / 255
    elif clip.is_floating_point():
        clip = clip.float()
    else:
        raise UsageError(f"{kind} to judge is uint8 or float in [0, 1], not {clip.dtype}")
    if not bool(torch.isfinite(clip).all()):
        raise UsageError(
            "the pixels to judge hold NaN or infinite values; the generation went wrong before the judge"
        )
    clip = clip.clamp(0, 1).permute(0, 3, 1, 2)
    height, width = clip.shape[-2:]
    if min(height, width) != _SHORT_SIDE:
        scale = _SHORT_SIDE / min(height, width)
        size = (round(height * scale), round(width * scale))
        clip = F.interpolate(clip, size=size, mode="bilinear", antialias=True, align_corners=False)
    return clip.contiguous()
