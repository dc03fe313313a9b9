"""Layouts: those a transformer's forwards had lately, built once each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dit_accel.arrangement import Arrangement
from dit_accel.layout import TokenLayout, build_layout


class Layouts:
    """Layouts of one arrangement, by grid, order, device and text.

    Args:
        arrangement: how tokens are ordered and cut.
    """

    def __init__(self, arrangement: Arrangement) -> None:
        self.arrangement = arrangement
        self._built: dict[tuple, TokenLayout] = {}

    def find(
        self,
        grid: tuple[int, int, int],
        order: str,
        device: torch.device,
        text: int,
        text_first: bool,
        first_frame_apart: bool,
        groups: int,
    ) -> TokenLayout:
        """The layout of some tokens.

        Args:
            grid: frames, rows and columns.
            order: the arrangement's, or "raster".
            text: tokens of it; `text_first`, whether they stand before the others.
            first_frame_apart: whether no block crosses the first frame's border.
            groups: numbers of text tokens in one forward: so many times more layouts are kept.
        """
        key = grid, order, device, text, text_first, first_frame_apart
        if key not in self._built:
            # a pipeline that changes size at every call must not fill the memory
            if len(self._built) >= 8 * max(1, groups):
                self._built.clear()
            tile = self.arrangement.tile if order == "tiles" else None
            options = dict(tile=tile, text=text, text_first=text_first, first_frame_apart=first_frame_apart)
            self._built[key] = build_layout(grid, order, self.arrangement.block, device, **options)
        return self._built[key]

    def of_call(self, query: Tensor, text: int, like: TokenLayout, groups: int) -> TokenLayout:
        """A forward's layout for the tokens of one call, where they are: offloading moves them after it began.

        Args:
            query: `[B, S, H, D]`.
            text: tokens of text among them.
            like: the layout that the forward began with.
        """
        if like.starts.device == query.device and like.text == text:
            return like
        kind = like.text_first, like.first_frame_apart
        return self.find(like.grid, like.order, query.device, text, *kind, groups)

    def bytes_held(self) -> int:
        return sum(layout.bytes_held() for layout in self._built.values())

    def clear(self) -> None:
        self._built.clear()

    def __iter__(self) -> Iterator[TokenLayout]:
        return iter(self._built.values())

    def __len__(self) -> int:
        return len(self._built)

    def __deepcopy__(self, memo: dict[int, Any]) -> Layouts:
        """Of the same arrangement; layouts are built anew."""
        return Layouts(self.arrangement)
