"""dit_accel: make an unmodified diffusers DiT pipeline faster and say truthfully what that cost.

Importing this package imports neither torch nor diffusers; the names below load their module at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Handle": "dit_accel.handle",
    "Report": "dit_accel.report",
    "SparseOptions": "dit_accel.options",
    "SparseProcessor": "dit_accel.processor",
    "accelerate": "dit_accel.handle",
}

__all__ = ["Handle", "Report", "SparseOptions", "SparseProcessor", "__version__", "accelerate"]

if TYPE_CHECKING:
    from dit_accel.handle import Handle, accelerate
    from dit_accel.options import SparseOptions
    from dit_accel.processor import SparseProcessor
    from dit_accel.report import Report


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
