"""neighborhood: each token reads a window of its neighbours; the sliding tiles of STA are a case of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UsageError
from dit_accel.methods.parts.axes import is_whole, per_axis

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call

AXES = ("frames", "rows", "columns")


@dataclass(frozen=True)
class Method:
    """Generalised neighborhood attention: on each axis, a window of so many tokens that stays inside the axis.

    Per axis: tokens are taken in groups of `stride` that share a window, centred on the group's middle and moved
    inward where it would leave the axis, so every token sees a whole window. A window longer than the axis is the
    axis. With dilation d, tokens whose coordinates leave the same rest by d form a sequence of their own, with the
    window in it. On a causal axis the window ends at the token itself and is counted from the last of its group. A
    token is read if it is in the window on all three axes.

    The plan is exact, each token reading its window and nothing else, where tiles begin and end with the windows: the
    axis and the stride are multiples of the tile, and window less stride is an even multiple of it. Otherwise a pair of
    blocks is kept if any pair of their tokens is in the window: some queries then read more than their window, none
    less. So it is for every token order, on causal axes (the window ends within the own tile), and with dilation (a
    tile holds tokens of every group, so it saves little).

    Sliding tile attention is a stride of one tile, which is the default, and windows of an odd number of tiles. STA's
    own tiles of 6 x 8 x 8 tokens, three blocks each, are stride (6, 8, 8), and its window of 3 x 3 x 5 of them is
    (18, 24, 40).

    The default reads .27 to .29 of the keys of 21 latent frames (Wan, 720p and 480p), .22 of 33 (HunyuanVideo, 720p).

    Source: generalised neighborhood attention, arXiv:2504.16922, and NATTEN's rules for edges; sliding tile
    attention, arXiv:2502.04507.
    """

    arrangement: ClassVar[Arrangement] = Arrangement("tiles", 128, (2, 8, 8))
    needs_grid: ClassVar[bool] = True
    rows_apart: ClassVar[bool] = True

    # frames, rows, columns: tokens (whole numbers), or shares of the axis (0.5; 1.0 is all of it), rounded to the
    # nearest odd number of strides
    window: tuple[int | float, int | float, int | float] = (0.6, 0.6, 0.6)
    # tokens that share a window; none: the edges of a tile, or one token in orders without tiles
    stride: tuple[int, int, int] | None = None
    dilation: tuple[int, int, int] = (1, 1, 1)  # read every so manieth token
    causal: tuple[bool, bool, bool] = (False, False, False)  # read nothing behind the own frame, row, column

    def __post_init__(self) -> None:
        rule = "a whole number of tokens from 1, or a share of the axis above 0.0 and up to 1.0"
        object.__setattr__(self, "window", per_axis("window", self.window, _is_window, rule))
        for name in ("stride", "dilation"):
            value = getattr(self, name)
            if value is not None:
                value = per_axis(name, value, lambda n: is_whole(n, 1), "a whole number from 1")
                object.__setattr__(self, name, value)
        causal = per_axis("causal", self.causal, lambda value: isinstance(value, bool), "true or false")
        object.__setattr__(self, "causal", causal)
        for axis, window, stride in zip(AXES, self.window, self.stride or (1, 1, 1), strict=True):
            if isinstance(window, int) and stride > window:
                raise UsageError(
                    f"stride {stride} of the {axis} is more than their window of {window}: tokens that share a "
                    "window must lie in it. Give a larger window or a smaller stride."
                )

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """The window's plan, one for all heads and batch rows.

        Args:
            query: `[B, S, H, D]`; only its device is looked at.
        """
        from dit_accel.methods.parts.windows import FAR, blocks_within, plan_once, tile_edges

        strides = self.stride or tile_edges(layout)
        windows = map(_tokens_of, self.window, layout.grid, strides)
        # In tokens: a window of 1 and a share of 1.0 are equal to Python.
        axes = tuple(zip(layout.grid, windows, strides, self.dilation, self.causal, strict=True))

        def build() -> Tensor:
            return blocks_within(layout, [~_axis_table(*axis) * FAR for axis in axes], 1)

        return plan_once(("neighborhood", axes), layout, query.device, build)


def _is_window(value: Any) -> bool:
    return is_whole(value, 1) or (isinstance(value, float) and 0 < value <= 1)


def _tokens_of(window: int | float, length: int, stride: int) -> int:
    """Tokens of a window: a share becomes the nearest odd number of strides, so that tiles are read whole."""
    if isinstance(window, int):
        return window
    if window == 1:
        return length
    return stride * (2 * int(window * length / stride / 2) + 1)


def _axis_table(length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Which coordinate of an axis reads which, bool `[length, length]`."""
    import torch

    coordinate = torch.arange(length)
    group, place = coordinate % dilation, coordinate // dilation
    count = (length - 1 - group) // dilation + 1  # tokens of the own group
    window = count.clamp(max=window)
    stride = window.clamp(max=stride)
    begins = place // stride * stride  # first of those that share a window
    if causal:
        first = (begins + stride).clamp(max=count) - window
        last = place
    else:
        centre = (begins + stride // 2).minimum(count - 1)
        first = (centre - window // 2).maximum(torch.zeros_like(centre)).minimum(count - window)
        last = first + window - 1
    inside = (place >= first[:, None]) & (place <= last[:, None])
    return inside & (group == group[:, None])
