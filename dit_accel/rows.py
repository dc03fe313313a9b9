"""Batch rows that are attended together: those of which equally many text tokens are no padding.

Each group of rows has a layout, plans and memory of its own, so that a row comes out as it would alone. Padding is left
out wherever the text stands, which is exact: nothing reads it, and what it would read reaches no output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.trajectory import Facts, Segments, segments_of


@dataclass(frozen=True)
class RowGroup:
    """Rows of one batch, and which of their tokens are no padding."""

    rows: tuple[int, ...]  # ascending
    batch: int  # rows there are
    text: int  # text tokens of each row that are no padding
    padding: int  # text tokens behind them
    text_first: bool  # whether text and padding stand before the other tokens
    segments: Segments  # what the tokens are, padding included

    @property
    def is_everything(self) -> bool:
        """Whether this is the whole batch, without any padding."""
        return len(self.rows) == self.batch and not self.padding

    @property
    def copies(self) -> bool:
        """Whether `take` must copy."""
        return not isinstance(self._rows, slice) or bool(self.padding and self.text_first)

    @property
    def _rows(self) -> slice | list[int]:
        """As an index; evenly spaced rows need no copy."""
        steps = {b - a for a, b in zip(self.rows, self.rows[1:], strict=False)} or {1}
        return slice(self.rows[0], self.rows[-1] + 1, *steps) if len(steps) == 1 else list(self.rows)

    def take(self, x: Tensor) -> Tensor:
        """These rows of `[B, S, H, D]` without their padding: `[rows, S - padding, H, D]`."""
        x = x[self._rows]
        if not self.padding:
            return x
        if not self.text_first:
            return x[:, : -self.padding]
        return torch.cat([x[:, : self.text], x[:, self.text + self.padding :]], dim=1)

    def put(self, out: Tensor, whole: Tensor) -> None:
        """Write these rows' result `[rows, S - padding, H, D]` to its places in `[B, S, H, D]`."""
        if self.padding and self.text_first:
            whole[self._rows, : self.text] = out[:, : self.text]
            whole[self._rows, self.text + self.padding :] = out[:, self.text :]
        else:
            whole[self._rows, : out.shape[1]] = out


def group_rows(facts: Facts, batch: int, apart: bool) -> tuple[RowGroup, ...]:
    """The rows of a forward by their number of text tokens, in the order of their first rows; none without padding.

    Args:
        batch: rows there are; one row's number holds for all, as its mask does.
        apart: each row is a group by itself.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    valid = facts.text_valid or ()
    for row, text in enumerate(valid * batch if len(valid) == 1 else valid):
        groups.setdefault((text, row if apart else 0), []).append(row)
    return tuple(
        RowGroup(tuple(rows), batch, text, facts.text - text, facts.text_first, segments_of(facts, text))
        for (text, _), rows in groups.items()
    )
