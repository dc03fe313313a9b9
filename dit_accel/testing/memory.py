"""Memory that a call takes, for the law on it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any


def peak_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Memory that a call takes from torch's CPU allocator.

    Only what is allocated during the call counts: freeing an earlier result, or what another call left to the
    garbage collector, makes no room. The collector rests meanwhile, since when it strikes is chance; what hangs in
    reference cycles is therefore counted to the end.

    Returns:
        the most held at once of what the call allocated, and the largest single piece; in bytes.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        if collects:
            gc.enable()
    held: dict[int, int] = {}  # bytes by address
    now = peak = largest = 0
    for piece in sorted(_pieces(profiler), key=lambda event: event.start_time_ns):
        address, size = piece.extra_fields.ptr, piece.extra_fields.alloc_size
        if size > 0:
            held[address] = size
            now += size
            peak, largest = max(peak, now), max(largest, size)
        else:
            now -= held.pop(address, 0)
    return peak, largest


def _pieces(profiler: Any) -> Iterator[Any]:
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            yield event
