"""Which query blocks read each key block, and how that work is cut into even pieces: `invert_plan`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import choose, invert_plan, why_not
from .inverse import Inverse

__all__ = ["IMPLEMENTATIONS", "Inverse", "choose", "invert_plan", "why_not"]
