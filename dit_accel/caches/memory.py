"""Memory: what a cache keeps of each branch of guidance, between two steps and no longer than a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Entry:
    """What is kept of one branch."""

    signature: tuple  # of the forwards it comes from: another one's memory is of no use
    step: int = -1  # the step seen last
    noise: float = float("inf")
    computed: int = 0
    reused: int = 0
    consecutive: int = 0  # steps reused since one was computed
    memory: dict[str, Any] = field(default_factory=dict)


class Memory:
    """Entries by branch. They are dropped when a run begins, and after a forward that did not return."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._entries: dict[str, Entry] = {}

    def entry(self, branch: str, signature: tuple) -> Entry | None:
        """The branch's entry if it was made by forwards like this one."""
        held = self._entries.get(branch)
        return held if held is not None and held.signature == signature else None

    def load(self, entry: Entry, device: torch.device | None) -> dict[str, Any]:
        """A copy of an entry's memory, its tensors on a device; None leaves them where they are kept."""
        return _mapped(entry.memory, lambda x: x if device is None else x.to(device))

    def away(self, value: Any) -> Any:
        """A value with its tensors where they are kept."""
        return _mapped(value, lambda x: x.cpu()) if self._device == "cpu" else value

    def put(self, branch: str, entry: Entry, memory: dict[str, Any]) -> None:
        """Keep an entry with this memory."""
        entry.memory = self.away(memory)
        self._entries[branch] = entry

    def release(self, branch: str, entry: Entry) -> None:
        """Let go of an entry's tensors: whoever loaded them holds them alone, until they are put back."""
        self._entries.pop(branch, None)
        entry.memory = {}

    def clear(self) -> None:
        self._entries.clear()

    def bytes_held(self) -> int:
        """Tensors that several names hold count once."""
        tensors = {id(x): x for entry in self._entries.values() for x in _tensors_in(entry.memory)}
        return sum(x.numel() * x.element_size() for x in tensors.values())

    def __repr__(self) -> str:
        return f"Memory({len(self._entries)} branches, {self.bytes_held()} bytes)"


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(x)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same dicts, lists and tuples with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(x, change) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(x, change) for x in value)
    return value
