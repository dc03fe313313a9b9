"""Means over blocks of tokens: `block_means`, `block_deviations`, `block_directions`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import block_deviations, block_directions, block_means, choose, why_not

__all__ = ["IMPLEMENTATIONS", "block_deviations", "block_directions", "block_means", "choose", "why_not"]
