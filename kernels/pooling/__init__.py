"""Mean pooling over blocks of tokens: `block_means`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import block_means, choose, why_not

__all__ = ["IMPLEMENTATIONS", "block_means", "choose", "why_not"]
