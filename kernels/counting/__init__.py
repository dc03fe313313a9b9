"""How much of all attention a plan reads: `count_pairs`."""

from .api import IMPLEMENTATIONS, choose, count_pairs, why_not

__all__ = ["IMPLEMENTATIONS", "choose", "count_pairs", "why_not"]
