"""How much of all attention a plan reads: `count_pairs`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import choose, count_pairs, why_not

__all__ = ["IMPLEMENTATIONS", "choose", "count_pairs", "why_not"]
