"""Lists as bitmaps, an eighth of a byte a pair of blocks: `pack_lists`, `unpack_lists`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import choose, pack_lists, unpack_lists, why_not

__all__ = ["IMPLEMENTATIONS", "choose", "pack_lists", "unpack_lists", "why_not"]
