"""From block scores to the index lists of a plan: `select_blocks`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import choose, select_blocks, why_not

__all__ = ["IMPLEMENTATIONS", "choose", "select_blocks", "why_not"]
