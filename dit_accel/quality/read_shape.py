"""Read an object's shape, size and rotation by matching its coverage with drawn templates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.quality.find_objects import Track
from dit_accel.quality.scenes import SHAPES, signed_distance

_ANGLES = 72
_SIDE = 36  # samples across a patch
_HALF = 1.15  # half a patch, in square roots of the object's area: a star's tip lies at 0.9
_RECOGNISED = 0.4  # fit below which no shape is named; blurred small stars reach 0.59, clutter 0.2
_FASTEST = 2.0  # whole turns per clip that are still searched
_RATE_STEP = 0.125


@dataclass(frozen=True)
class ShapeReading:
    shape: str  # `unclear` when no template resembles it
    fit: float  # intersection over union with the best templates, mean over frames, in [0, 1]
    turns: float  # rotations during the clip, signed; 0 unless rotating explains the frames clearly better
    radius: Tensor  # fp32 [F], pixels, NaN where not seen


@dataclass(frozen=True)
class Templates:
    """Every shape at every angle, centred on its centroid and scaled to area 1, as the coverage reads it."""

    cover: Tensor  # [shapes, angles, side * side]
    area: Tensor  # [shapes], in squared circumradii


def draw_templates() -> Templates:
    fine = (torch.arange(160) + 0.5) / 160 * 2.8 - 1.4
    v, u = torch.meshgrid(fine, fine, indexing="ij")
    step = _patch_steps()
    dy, dx = torch.meshgrid(step, step, indexing="ij")
    turn = torch.arange(_ANGLES) * (2 * math.pi / _ANGLES)
    cos, sin = torch.cos(turn)[:, None, None], torch.sin(turn)[:, None, None]
    covers, areas = [], []
    for shape in SHAPES:
        inside = _draw(shape, u, v, 0.02)
        area = inside.sum() * (2.8 / 160) ** 2
        mu, mv = (inside * u).sum() / inside.sum(), (inside * v).sum() / inside.sum()
        scale = area.sqrt()
        local_u = (dx * cos + dy * sin) * scale + mu
        local_v = (dy * cos - dx * sin) * scale + mv
        covers.append(_draw(shape, local_u, local_v, 0.08).flatten(1))
        areas.append(area)
    return Templates(torch.stack(covers), torch.stack(areas))


def read_shape(track: Track, templates: Templates, time: Tensor) -> ShapeReading:
    """Fit one shape to the whole clip, turning at a constant rate (0 included).

    Args:
        time: `[F]`, each frame's time in [0, 1].
    """
    seen = track.seen
    patches = _cut_patches(track.cover[seen], track.centre[seen], track.area[seen])  # [f, side * side]
    shapes, angles, pixels = templates.cover.shape
    flat = templates.cover.view(shapes * angles, pixels)
    cross = patches @ flat.T
    loss = (patches.square().sum(1, keepdim=True) - 2 * cross + flat.square().sum(1)) / flat.square().sum(1)
    loss = loss.view(-1, shapes, angles)  # [f, shapes, angles]

    rates = torch.arange(-_FASTEST, _FASTEST + 1e-6, _RATE_STEP)
    start = torch.arange(angles)
    index = (
        start + (rates[:, None, None] * time[seen][:, None] * angles).round().long()
    ) % angles  # [rate, f, start]
    index = index.permute(1, 0, 2).reshape(len(loss), 1, -1).expand(-1, shapes, -1)
    over_time = loss.gather(2, index).mean(0).view(shapes, len(rates), angles)

    best = over_time.flatten(1).min(1)
    shape = int(best.values.argmin())
    rate, phase = divmod(int(best.indices[shape]), angles)
    still = over_time[shape, rates == 0].min()
    # A circle or a blurred star fits almost as well unturned: rotation must explain a clear part of the misfit.
    turns = float(rates[rate]) if best.values[shape] < 0.9 * still else 0.0

    chosen = (phase + (rates[rate] * time[seen] * angles).round().long()) % angles
    drawn = templates.cover[shape, chosen]
    fit = torch.minimum(patches, drawn).sum(1) / torch.maximum(patches, drawn).sum(1)
    radius = torch.full_like(time, torch.nan)
    radius[seen] = (track.area[seen] / templates.area[shape]).sqrt()
    name = SHAPES[shape] if fit.mean() >= _RECOGNISED else "unclear"
    return ShapeReading(name, float(fit.mean()), turns, radius)


def _patch_steps() -> Tensor:
    return ((torch.arange(_SIDE) + 0.5) / _SIDE * 2 - 1) * _HALF


def _draw(shape: str, u: Tensor, v: Tensor, edge: float) -> Tensor:
    """Coverage of a shape without its dark stripe, with edges about `edge` wide."""
    stripe = torch.maximum(u.abs() - 0.13, (v + 0.65).abs() - 0.5)
    inside = (0.5 - signed_distance(shape, u, v) / edge).clamp(0, 1)
    return inside * (1 - (0.5 - stripe / edge).clamp(0, 1))


def _cut_patches(cover: Tensor, centre: Tensor, area: Tensor) -> Tensor:
    """Sample each frame around its centroid at the scale of the square root of its area: `[F, side * side]`."""
    height, width = cover.shape[1:]
    step = _patch_steps()
    scale = area.sqrt()[:, None]
    x = centre[:, :1] + step * scale  # pixels
    y = centre[:, 1:] + step * scale
    grid = torch.stack(
        [
            (2 * x / width - 1)[:, None, :].expand(-1, _SIDE, -1),
            (2 * y / height - 1)[:, :, None].expand(-1, -1, _SIDE),
        ],
        dim=-1,
    )
    return F.grid_sample(cover[:, None], grid, align_corners=False).flatten(1)
