"""Mean pooling over blocks of tokens: `block_means`."""

from .api import IMPLEMENTATIONS, block_means, choose, why_not

__all__ = ["IMPLEMENTATIONS", "block_means", "choose", "why_not"]
