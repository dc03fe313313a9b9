"""From block scores to the index lists of a plan: `select_blocks`."""

from .api import IMPLEMENTATIONS, choose, select_blocks, why_not

__all__ = ["IMPLEMENTATIONS", "choose", "select_blocks", "why_not"]
