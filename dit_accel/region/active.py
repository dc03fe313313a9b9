"""ActiveTokens: the tokens that one forward computes, taken out of the sequence and put back into it.

It stands where a `TokenLayout` stands in the hooks that reorder tokens, with an index shorter than the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.layout import Grid


@dataclass(frozen=True, eq=False)
class ActiveTokens:
    """Some tokens of each batch row."""

    grid: Grid  # of all tokens: frames, rows, columns
    index: Tensor  # int64 [N, K], raster indices; ascending, or of whole blocks in the layout's order
    velocity: Tensor  # fp32 [N, S, P], of all tokens as they left the transformer last

    @property
    def n_video_tokens(self) -> int:
        """How many tokens of image or video there are in this forward."""
        return self.index.shape[1]

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """The active tokens of `x`, which lie along `dim`. A table for all rows, `[1, ...]`, becomes one for each."""
        rows = x.expand(len(self.index), *x.shape[1:])
        return rows.gather(dim, self._along(dim, rows))

    def undo(self, x: Tensor, dim: int) -> Tensor:
        """All tokens: the active ones from `x`, the others as they were computed last."""
        assert dim == 1 and x.shape[1] == self.n_video_tokens
        return self.velocity.scatter(1, self._along(1, x), x.float()).to(x.dtype)

    def _along(self, dim: int, like: Tensor) -> Tensor:
        shape = [len(self.index), *(1 for _ in like.shape[1:])]
        shape[dim] = self.n_video_tokens
        wide = [len(self.index), *like.shape[1:]]
        wide[dim] = self.n_video_tokens
        return self.index.to(like.device).view(shape).expand(wide)


def repeat_rows(index: Tensor, rows: int) -> Tensor:
    """An index of the latents' rows, for a forward that holds them once for each branch of guidance."""
    return index if len(index) == rows else index.repeat(rows // len(index), *(1 for _ in index.shape[1:]))


def write_rows(kept: Tensor, at: Tensor, rows: Tensor) -> None:
    """Put `rows` `[N, K, H, D]` into `kept` `[N, S, H, D]`, at the places `at` `[N, K]` of each batch row."""
    batch = torch.arange(len(kept), device=kept.device)[:, None]
    kept[batch, at.to(kept.device)] = rows
