"""Linear attention over the key blocks that sparse attention does not read, or over all keys: `linear_attention`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import FEATURES, WORKSPACE, bytes_of_all_keys, choose, linear_attention, why_not

__all__ = ["FEATURES", "IMPLEMENTATIONS", "WORKSPACE", "bytes_of_all_keys", "choose", "linear_attention", "why_not"]
