"""No cache on one transformer of a pipeline whose others have one: it is computed always, and counted with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_accel.caches.cache import NEVER, Cache, Parts, View


@dataclass(frozen=True)
class Off(Cache):
    """Keeps nothing and reuses nothing."""

    def judge(self, view: View, memory: dict[str, Any]) -> float:
        return NEVER

    def learn(self, view: View, parts: Parts, memory: dict[str, Any]) -> None:
        raise AssertionError("a forward that is computed apart is not learnt from")

    def kept(self) -> dict[str, int]:
        return {}
