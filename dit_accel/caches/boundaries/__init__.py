"""Where a cache comes between a transformer and its work; a class for each `boundary` a cache may name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_accel.caches.boundaries.boundary import Boundary
    from dit_accel.caches.engine import CacheEngine


def make_boundary(engine: CacheEngine) -> Boundary:
    """The boundary of the engine's cache."""
    from dit_accel.caches.boundaries.call import CallBoundary
    from dit_accel.caches.boundaries.modules import ModuleBoundary
    from dit_accel.caches.boundaries.stack import StackBoundary

    return {"call": CallBoundary, "stack": StackBoundary, "modules": ModuleBoundary}[engine.cache.boundary](engine)
