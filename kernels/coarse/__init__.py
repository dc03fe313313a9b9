"""Giving back what was not read, block by block: `add_block_means`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import add_block_means, choose, why_not

__all__ = ["IMPLEMENTATIONS", "add_block_means", "choose", "why_not"]
