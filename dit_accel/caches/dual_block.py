"""DBCache: the first `fn` and the last `bn` blocks run at every step, those between are made up where the first allow
it.

Source: cache-dit. `first_block` is its special case F1 B0. Defaults are the published ones (F8 B0, threshold .08,
eight steps of warm-up). Its limits are those of all caches here (`max_consecutive`, `max_reused`), its masks are
`schedule`. cache-dit takes turns to tell branches apart, so that a guidance interval mixes them, and its accumulated
limit is never reset within a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.caches import first_block
from dit_accel.caches.cache import need, whole


@dataclass(frozen=True)
class Cache(first_block.Cache):
    """As `first_block`, with more blocks at either end."""

    warmup: int = 8
    fn: int = 8  # blocks computed first
    bn: int = 0  # blocks computed last

    def __post_init__(self) -> None:
        super().__post_init__()
        need(whole(self.fn) and self.fn >= 1, "fn", self.fn, "a whole number from 1 on")
        need(whole(self.bn) and self.bn >= 0, "bn", self.bn, "a whole number from 0 on")

    @property
    def head(self) -> int:  # type: ignore[override]
        return self.fn

    @property
    def tail(self) -> int:  # type: ignore[override]
        return self.bn
