"""Clocks for the parts of a run: on a GPU its own, so that nothing waits for it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Intervals on a device by name. On a GPU they are read from its own clock, and nothing waits meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._laps: dict[str, list[tuple[Any, Any]]] = {}

    def now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, name: str, start: Any) -> None:
        """Note an interval that began at `start` and ends now."""
        self._laps.setdefault(name, []).append((start, self.now()))

    def read(self) -> dict[str, list[float]]:
        """Milliseconds of every interval."""
        if not self._gpu:
            return {name: [(b - a) * 1e3 for a, b in laps] for name, laps in self._laps.items()}
        torch.cuda.synchronize()
        return {name: [a.elapsed_time(b) for a, b in laps] for name, laps in self._laps.items()}


def timed(function: Callable, watch: Stopwatch, name: str) -> Callable:
    """A function whose every call is noted."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = watch.now()
        out = function(*args, **kwargs)
        watch.note(name, start)
        return out

    return run


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call with all its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
