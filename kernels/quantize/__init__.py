"""Low-precision copies of queries, keys and values: `quantize_blocks`, and `MODES` that say which."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import KEY_ORDER, MODES, ROWS, Mode, Quantised, choose, quantize_blocks, why_not

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
