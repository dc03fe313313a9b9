"""Rows of tokens: which to compute, and how they leave the others and come back."""

from __future__ import annotations

import torch
from torch import Tensor

_LAYERS = 1 << 16  # more than any transformer has


def chance_of(tokens: int, step: int, layer: int, device: torch.device) -> Tensor:
    """A number from 0 to 1 for each token, the same whenever step and layer are: fp32 `[tokens]`.

    No generator of the process is touched. Rows of a batch share it, so that one comes out as it would alone.
    """
    generator = torch.Generator().manual_seed(step * _LAYERS + layer)
    return torch.rand(tokens, generator=generator).to(device)


def choose_rows(score: Tensor, age: Tensor | None, count: int, oldest: int) -> Tensor:
    """The `oldest` of greatest age and beside them those of highest score, `count` in all. Waits for no device.

    Where the same number `oldest` is chosen at each step out of `S` rows, none stays out for `ceil(S / oldest)` steps:
    each step that passes a row over takes as many that are at least as old, and those are younger from then on.

    Args:
        score, age: `[B, S]`; `age` is read where `oldest` is not 0. Ties go to the lower row.

    Returns:
        int64 `[B, count]`, ascending.
    """
    if oldest:
        first = age.sort(dim=1, descending=True, stable=True).indices[:, :oldest]
        score = score.scatter(1, first, float("inf"))
    chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return chosen.sort(dim=1).values


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`[B, S, C]`, rows `[B, k]` -> `[B, k, C]`, a copy."""
    return x.reshape(-1, x.shape[-1]).index_select(0, _flat(rows, x.shape[1])).view(*rows.shape, x.shape[-1])


def put_rows(x: Tensor, rows: Tensor, some: Tensor) -> Tensor:
    """A copy of `[B, S, C]` with rows `[B, k]`, each named once, replaced by `some` `[B, k, C]`."""
    flat = x.reshape(-1, x.shape[-1]).index_copy(0, _flat(rows, x.shape[1]), some.flatten(0, 1).to(x.dtype))
    return flat.view(x.shape)


def _flat(rows: Tensor, tokens: int) -> Tensor:
    first = torch.arange(len(rows), device=rows.device) * tokens
    return (rows + first[:, None]).flatten()
