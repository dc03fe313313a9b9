"""What there is to say where memory ran out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dit_accel.errors import OutOfMemory

_CPU = ("DefaultCPUAllocator", "not enough memory")  # torch's own, which has no class for it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU)


def first_words(error: BaseException) -> str:
    """What an error of torch's says first: that memory ran out, and what was asked for."""
    return ". ".join(str(error).split(". ")[:2]).rstrip(".") or "out of memory"


def explain(error: BaseException, needs: Mapping[str, int], way_out: str) -> OutOfMemory:
    """The error in one line, to be raised by the caller.

    Args:
        error: as `is_out_of_memory` knows it.
        needs: as `Handle.needs` has it.
        way_out: what to do.
    """
    told = ", ".join(f"{size / 2**30:.3g} GiB by {name}" for name, size in needs.items())
    wanted = f" Wanted beside the model's own: {told}." if told else ""
    return OutOfMemory(f"{first_words(error)}.{wanted} {way_out}")
