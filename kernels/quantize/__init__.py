"""Low-precision copies of queries, keys and values: `quantize_blocks`, and `MODES` that say which."""

from .api import IMPLEMENTATIONS, KEY_ORDER, MODES, ROWS, Mode, Quantised, choose, quantize_blocks, why_not

__all__ = [
    "IMPLEMENTATIONS",
    "KEY_ORDER",
    "MODES",
    "ROWS",
    "Mode",
    "Quantised",
    "choose",
    "quantize_blocks",
    "why_not",
]
