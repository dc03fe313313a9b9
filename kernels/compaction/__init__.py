"""Shortening a plan's lists by what a call found: `compact_lists`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import choose, compact_lists, why_not

__all__ = ["IMPLEMENTATIONS", "choose", "compact_lists", "why_not"]
