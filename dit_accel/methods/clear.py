"""clear: each token reads a disc of rows and columns around its own place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UsageError
from dit_accel.methods.parts.axes import is_whole

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call


@dataclass(frozen=True)
class Method:
    """Keys less than `radius` tokens away in rows and columns, in all frames or in near ones; and all text.

    A pair of blocks is read if any pair of its tokens is in the disc: no token reads less than its disc, and those
    beside the disc's edge read more. The arrangement's tiles are as near to cubes as the grid allows; where it has one
    frame they are flat, near to squares.

    Made for images (FLUX), where the radius is 8, 16 or 32 and the model is trained for it; the additional keys pooled
    over the whole image that some of those models have are not here. How much is kept depends on the grid: in 64 x 64
    tokens (an image of 1024 x 1024 pixels), the default reads about .33.

    Source: CLEAR, arXiv:2412.16112, section 3; frames are our addition.
    """

    arrangement: ClassVar[Arrangement] = Arrangement("tiles", 128, None)
    needs_grid: ClassVar[bool] = True
    rows_apart: ClassVar[bool] = True

    radius: float = 16  # tokens; a key at exactly this distance is not read
    frame_radius: int | None = None  # also at most so many frames away, 0 is the own frame; none: all frames

    def __post_init__(self) -> None:
        number = isinstance(self.radius, int | float) and not isinstance(self.radius, bool)
        if not number or not 0 < self.radius <= 10_000:
            raise UsageError(
                f"radius={self.radius!r} is not possible: radius is a number of tokens above 0, at most 10000."
            )
        if self.frame_radius is not None and not is_whole(self.frame_radius, 0):
            raise UsageError(
                f"frame_radius={self.frame_radius!r} is not possible: frame_radius is a whole number of frames from "
                "0, or none for all frames."
            )

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """The disc's plan, one for all heads and batch rows.

        Args:
            query: `[B, S, H, D]`; only its device is looked at.
        """
        import torch

        from dit_accel.methods.parts.windows import FAR, blocks_within, plan_once

        def build() -> Tensor:
            apart = [torch.arange(n, dtype=torch.int32) for n in layout.grid]
            frames, rows, columns = ((x[:, None] - x).abs() for x in apart)
            reach = layout.grid[0] if self.frame_radius is None else self.frame_radius
            far = (frames > reach).int() * FAR
            # Squared distances are whole numbers: below the squared radius is below it rounded up.
            return blocks_within(layout, (far, rows**2, columns**2), math.ceil(self.radius**2))

        return plan_once(("clear", self.radius, self.frame_radius), layout, query.device, build)
