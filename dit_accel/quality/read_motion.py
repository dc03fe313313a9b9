"""Name an object's motion by fitting the closed forms of `scenes.object_path` to its measured path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TRAVELS = (
    0.13  # path extent, in shorter sides, from which an object moves from its place; scenes start at 0.32
)
_GROWS = 1.5  # last radius over first from which it grows; scenes have 2.7
_SPINS = 0.5  # whole turns from which it spins; scenes have 1.25
_EXPLAINS = 0.35  # a form fits when it leaves at most this share of the path's deviation unexplained


def read_motion(centre: Tensor, time: Tensor, growth: float, turns: float) -> str:
    """One of the scenes' motions, `still` or `unclear`.

    Args:
        centre: fp32 `[F, 2]`, (x right, y down) in shorter sides, without missing frames.
        time: fp32 `[F]` in [0, 1], the frames' times.
        growth: last radius over first.
        turns: whole rotations during the clip.
    """
    low, high = (torch.quantile(centre, q, dim=0) for q in (0.04, 0.96))
    if float((high - low).max()) >= _TRAVELS:
        return _name_path(centre.double(), time.double())
    if growth >= _GROWS:
        return "grow"
    if abs(turns) >= _SPINS:
        return "spin"
    return "still" if growth > 1 / _GROWS else "unclear"


def _name_path(centre: Tensor, time: Tensor) -> str:
    x, y = (centre - centre.mean(0)).unbind(1)
    total = float((x.square() + y.square()).sum())
    slope_x, loss_x = _fit_line(x, time)
    slope_y, loss_y = _fit_line(y, time)
    still_x, still_y = float(x.square().sum()), float(y.square().sum())
    losses = {
        "right" if slope_x > 0 else "left": loss_x + still_y,
        "down" if slope_y > 0 else "up": loss_y + still_x,
        "around": _fit_circle(x, y, time),
        "bounce": _fit_bounce(y, time) + still_x,
    }
    name = min(losses, key=losses.__getitem__)
    return name if losses[name] <= _EXPLAINS**2 * total else "unclear"


def _fit_line(value: Tensor, time: Tensor) -> tuple[float, float]:
    """Slope and squared residual of a straight line; `value` has mean 0."""
    centred = time - time.mean()
    slope = float((value * centred).sum() / centred.square().sum())
    return slope, float((value - slope * centred).square().sum())


def _fit_circle(x: Tensor, y: Tensor, time: Tensor) -> float:
    """Squared residual of the best circle run through once (0.8 to 1.2 times) in either sense."""
    rate = 2 * math.pi * torch.linspace(0.8, 1.2, 9, dtype=time.dtype)
    basis = torch.exp(1j * rate[:, None] * time)  # [rates, F]
    basis = basis - basis.mean(1, keepdim=True)
    power = basis.abs().square().sum(1)
    best = math.inf
    for sense in (1, -1):
        path = torch.complex(x, sense * y)
        gain = (basis.conj() * path).sum(1) / power
        loss = (path - gain[:, None] * basis).abs().square().sum(1)
        best = min(best, float(loss.min()))
    return best


def _fit_bounce(y: Tensor, time: Tensor) -> float:
    """Squared residual of `-height * |sin|`, two arcs a clip (1.7 to 2.3), at any phase."""
    rate = torch.linspace(0.85, 1.15, 7, dtype=time.dtype)[:, None, None]
    phase = (torch.arange(32, dtype=time.dtype) / 64)[:, None]
    basis = -torch.sin(2 * math.pi * (rate * time + phase)).abs()  # y points down, the arcs point up
    basis = basis - basis.mean(-1, keepdim=True)
    height = ((basis * y).sum(-1) / basis.square().sum(-1)).clamp_min(0)
    return float((y - height[..., None] * basis).square().sum(-1).min())
