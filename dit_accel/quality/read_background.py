"""Read the background: the kind of its texture and whether it drifts, from the pixels no object covers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 64  # samples along the shorter side: the textures have nothing finer
_FRAMES = 12  # frames looked at
_DRIFTS = 0.1  # drift, in shorter sides a clip, from which a background pans; scenes start at 0.22
_PLAIN = 0.015  # standard deviation of brightness below which there is no texture


def read_background(frames: Tensor, cover: Tensor) -> tuple[str, tuple[float, float]]:
    """Name the texture (`plain` when there is none) and measure its drift.

    Args:
        frames: fp32 `[F, 3, H, W]` in [0, 1].
        cover: fp32 `[F, H, W]`, coverage by anything coloured.

    Returns:
        The kind and the drift (x, y) during the clip in shorter sides, (0, 0) for a static background.
    """
    height, width = frames.shape[-2:]
    scale = _SIDE / min(height, width)
    size = (round(height * scale), round(width * scale))
    chosen = torch.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().long()
    time = chosen / max(len(frames) - 1, 1) - 0.5
    # Averaged first, so that noise hides nothing; grown after, so that no soft edge of an object is left.
    hidden = F.max_pool2d(F.avg_pool2d(cover[chosen, None], 5, 1, 2), 9, 1, 4) > 0.15
    free = F.interpolate((~hidden).float(), size=size, mode="area").floor()
    light = F.interpolate(frames[chosen].mean(1, keepdim=True), size=size, mode="area")
    light = F.avg_pool2d(light, 3, 1, 1, count_include_pad=False)

    pans = _candidate_pans()
    variance = torch.stack([_misalignment(light, free, time, pan) for pan in pans])
    spread = _contrast(light, free)
    if spread.sqrt() < _PLAIN:
        return "plain", (0.0, 0.0)
    best = int(variance.argmin())
    floor = 0.03 * spread
    moves = max(map(abs, pans[best])) >= _DRIFTS and variance[0] + floor > 3 * (variance[best] + floor)
    pan = pans[best] if moves else (0.0, 0.0)
    image, weight = _align(light, free, time, pan)
    return name_texture(image, weight), pan


def name_texture(image: Tensor, weight: Tensor) -> str:
    """`gradient`, `striped`, `checkered` or `cloudy`: the simplest closed form that explains the brightness.

    Args:
        image: fp32 `[H, W]`, the background without objects.
        weight: fp32 `[H, W]`, how well each pixel is known, 0 where it never showed.
    """
    plane, stripes, checks = score_textures(image, weight)
    if plane > 0.8:
        return "gradient"
    if stripes > 0.8 and stripes > checks:
        return "striped"
    return "checkered" if checks > 0.6 else "cloudy"


def score_textures(image: Tensor, weight: Tensor) -> tuple[float, float, float]:
    """Share of the brightness' variance explained by a plane, by straight stripes and by checks."""
    height, width = image.shape
    short = min(height, width)
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / short, (torch.arange(width) + 0.5) / short, indexing="ij"
    )
    known = weight.flatten() > 0
    x, y, level = x.flatten()[known], y.flatten()[known], image.flatten()[known]
    level = level - level.mean()
    level = level / level.square().mean().sqrt()
    flat = torch.stack([torch.ones_like(x), x, y], 1)
    return _explain(flat, level), _explain_stripes(x, y, level), _explain_checks(x, y, level)


def _explain(basis: Tensor, level: Tensor) -> float:
    """R squared of a least-squares fit; `level` has mean 0 and variance 1."""
    return float(1 - (level - basis @ torch.linalg.lstsq(basis, level).solution).square().mean())


def _explain_stripes(x: Tensor, y: Tensor, level: Tensor) -> float:
    """R squared of the best profile along one direction, the same on every line across it."""
    bins = 48
    best = 0.0
    for angle in torch.arange(0, 180, 5) * (math.pi / 180):
        along = x * torch.cos(angle) + y * torch.sin(angle)
        index = ((along - along.min()) / (along.max() - along.min()) * (bins - 1e-3)).long()
        count = torch.zeros(bins).index_add_(0, index, torch.ones_like(level))
        total = torch.zeros(bins).index_add_(0, index, level)
        # Each bin's mean costs one degree of freedom, or corners with few pixels would look explained.
        explained = (total.square() / count.clamp_min(1) - (count > 0).float()).sum() / len(level)
        best = max(best, float(explained))
    return best


def _explain_checks(x: Tensor, y: Tensor, level: Tensor) -> float:
    """R squared of the best soft checkerboard, one period for both directions."""
    best, best_form = 0.0, None
    for period in torch.linspace(0.22, 0.42, 41):
        wave = 2 * math.pi / period
        sx, cx, sy, cy = torch.sin(wave * x), torch.cos(wave * x), torch.sin(wave * y), torch.cos(wave * y)
        basis = torch.stack([sx * sy, sx * cy, cx * sy, cx * cy], 1)
        gain = torch.linalg.solve(basis.T @ basis, basis.T @ level)
        score = float(1 - (level - basis @ gain).square().mean())
        if score > best:
            best, best_form = score, (sx, cx, sy, cy, gain)
    sx, cx, sy, cy, gain = best_form
    # A product of two waves has a 2x2 gain of rank 1; its factors are the two phases.
    left, _, right = torch.linalg.svd(gain.view(2, 2))
    product = (sx * left[0, 0] + cx * left[1, 0]) * (sy * right[0, 0] + cy * right[0, 1])
    square = torch.tanh(6 * product)
    square = square - square.mean()
    return float((square * level).mean() ** 2 / square.square().mean())


def _candidate_pans() -> list[tuple[float, float]]:
    steps = [0.04 * i for i in range(1, 12)]
    return [(0.0, 0.0), *((s * d[0], s * d[1]) for d in ((1, 0), (-1, 0), (0, 1), (0, -1)) for s in steps)]


def _shift(light: Tensor, free: Tensor, time: Tensor, pan: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Undo a drift: every frame as seen at half time, and which of its pixels are known."""
    height, width = light.shape[-2:]
    short = min(height, width)
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(len(time), 1, 1)
    identity[:, 0, 2] = 2 * pan[0] * time * short / width
    identity[:, 1, 2] = 2 * pan[1] * time * short / height
    grid = F.affine_grid(identity, list(light.shape), align_corners=False)
    known = F.grid_sample(free, grid, align_corners=False) > 0.99
    return F.grid_sample(light, grid, align_corners=False), known.float()


def _align(light: Tensor, free: Tensor, time: Tensor, pan: tuple[float, float]) -> tuple[Tensor, Tensor]:
    moved, known = _shift(light, free, time, pan)
    weight = known.sum(0)[0]
    return (moved * known).sum(0)[0] / weight.clamp_min(1), weight


def _misalignment(light: Tensor, free: Tensor, time: Tensor, pan: tuple[float, float]) -> Tensor:
    """Variance over time of the background after undoing a drift."""
    moved, known = _shift(light, free, time, pan)
    weight = known.sum(0, keepdim=True)
    mean = (moved * known).sum(0, keepdim=True) / weight.clamp_min(1)
    several = (weight > 1).float()
    freedom = ((weight - 1) * several).sum().clamp_min(1)
    return ((moved - mean).square() * known * several).sum() / freedom


def _contrast(light: Tensor, free: Tensor) -> Tensor:
    """Variance within a frame, averaged over frames (their mean would flatten a drifting texture)."""
    weight = free.sum((2, 3), keepdim=True)
    mean = (light * free).sum((2, 3), keepdim=True) / weight.clamp_min(1)
    return ((light - mean).square() * free).sum() / weight.sum().clamp_min(1)
