"""Which tokens are computed at the next step. Pure functions of tensors; every batch row is chosen for by itself.

Ties go by index and sorts are stable, so that equal seeds choose equal tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import UsageError


def measure(patches: Tensor, selector: str) -> Tensor:
    """What a token's velocity amounts to, `[B, S]` in fp32.

    Args:
        patches: `[B, S, P, C]`: of each token its places in the latents, and their channels.
        selector: "std", the standard deviation over channels, or "l2", the norm over channels; the mean over places.

    RAS takes them of the coming step's change, the velocity times the step's length: a factor common to all tokens,
    which changes no order.
    """
    patches = patches.float()
    by_place = patches.std(-1, correction=0) if selector == "std" else patches.norm(dim=-1)
    return by_place.mean(-1)


def change(now: Tensor, before: Tensor, steps: Tensor) -> Tensor:
    """How far a token's velocity moved in each of so many steps, `[B, S]` in fp32.

    Args:
        now, before: `[B, S, P, C]`.
        steps: `[B, S]`, between the two.
    """
    return (now.float() - before.float()).norm(dim=-1).mean(-1) / steps


def draw(n_tokens: int, seed: int, step: int) -> Tensor:
    """A measure by lot, `[1, S]` on the CPU: the control that every other selector must beat."""
    generator = torch.Generator().manual_seed(seed * 100_003 + step)
    return torch.rand(1, n_tokens, generator=generator) + 1e-3


def choose(measured: Tensor, left_out: Tensor, count: int, high_ratio: float, starvation: float) -> Tensor:
    """The tokens to compute.

    Args:
        measured: `[B, S]`, not negative.
        left_out: int `[B, S]`, for how many steps in a row each token was left out.
        count: tokens to compute.
        high_ratio: of the others, the share that is dropped from the high end; the rest from the low end.
        starvation: a token's measure moves away from the end that it may be dropped at by this exponent for each step
            that it was left out. (The published code raises it at both ends, so that what was dropped at the high one
            is dropped again.)

    Returns:
        int64 `[B, count]`, raster indices, ascending.
    """
    dropped = measured.shape[1] - count
    high = round(dropped * high_ratio)
    urgency = starvation * left_out
    # in logarithms: an exponential of many steps would overflow
    size = measured.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    out = torch.zeros_like(size, dtype=torch.bool)
    out.scatter_(1, (size - urgency).argsort(dim=1, descending=True, stable=True)[:, :high], True)
    low = (size + urgency).masked_fill(out, float("inf"))
    out.scatter_(1, low.argsort(dim=1, stable=True)[:, : dropped - high], True)
    return _kept(out, count)


def choose_masked(mask: Tensor, left_out: Tensor, count: int) -> Tensor:
    """The tokens to compute: those of the mask, then the others, in both cases those left out longest.

    Args:
        mask: bool `[B, S]`.
        left_out: int `[B, S]`.

    Returns:
        int64 `[B, count]`, raster indices, ascending.
    """
    score = left_out.long() + mask.long() * (left_out.max() + 1)
    out = torch.ones_like(mask)
    out.scatter_(1, score.argsort(dim=1, descending=True, stable=True)[:, :count], False)
    return _kept(out, count)


def read_mask(mask: Tensor, grid: tuple[int, int, int], batch: int) -> Tensor:
    """A user's mask as bool `[B, S]`.

    Raises:
        UsageError: another shape than `grid`, or `[batch, *grid]`.
    """
    mask = torch.as_tensor(mask)
    if tuple(mask.shape) not in (grid, (batch, *grid), (1, *grid)):
        raise UsageError(
            f"region option mask has shape {tuple(mask.shape)}, and this run has {grid} tokens (frames, rows, columns) "
            f"in {batch} batch row(s): give {grid} or {(batch, *grid)}."
        )
    return (mask != 0).reshape(-1, grid[0] * grid[1] * grid[2]).expand(batch, -1)


def _kept(out: Tensor, count: int) -> Tensor:
    """Indices of the tokens that are not out; all rows have equally many. `nonzero` would wait for the device."""
    return out.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
