"""The gradients of block-sparse attention in q, k and v, from its output and lse: `differentiate`."""

from dit_accel.kernels.choice import IMPLEMENTATIONS

from .api import choose, differentiate, why_not, workspace_bytes

__all__ = ["IMPLEMENTATIONS", "choose", "differentiate", "why_not", "workspace_bytes"]
