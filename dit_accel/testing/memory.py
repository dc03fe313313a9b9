"""Memory that a call takes, for the law on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def peak_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Memory that a call takes from torch's CPU allocator.

    Returns:
        the peak above what was held at the start, and the largest single piece; in bytes.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    pieces = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = largest = 0
    for piece in sorted(pieces, key=lambda e: e.start_ns()):
        held += piece.nbytes()
        peak, largest = max(peak, held), max(largest, piece.nbytes())
    return peak, largest
