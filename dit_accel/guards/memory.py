"""What there is to say where memory ran out."""

from __future__ import annotations

import torch

_CPU = ("DefaultCPUAllocator", "not enough memory")  # torch's own, which has no class for it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU)


def first_words(error: BaseException) -> str:
    """What an error of torch's says first: that memory ran out, and what was asked for."""
    return ". ".join(str(error).split(". ")[:2]).rstrip(".")
