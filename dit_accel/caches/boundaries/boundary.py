"""Boundary: what the engine asks of a place where work can be left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

    from dit_accel.caches.cache import Parts, View
    from dit_accel.caches.decider import Verdict
    from dit_accel.caches.engine import CacheEngine
    from dit_accel.trajectory import Call

Hooked = tuple[nn.Module, "ModelHook"]


class Boundary(ABC):
    """One transformer's; it holds what belongs to the forward under way."""

    lazy = False  # whether it fetches the tensors of a memory itself, one by one
    keeps_tokens = True  # whether what is kept is in the order of the tokens

    def __init__(self, engine: CacheEngine) -> None:
        self.engine = engine

    @abstractmethod
    def hooks(self, transformer: nn.Module) -> list[Hooked]:
        """Modules within the transformer, and what to hook to each. Touches nothing.

        Raises:
            UsageError: this cache cannot be had on this transformer.
        """

    def is_current(self, transformer: nn.Module) -> bool:
        """Whether the hooked modules are still the transformer's."""
        return True

    @abstractmethod
    def run(self, call: Call, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The transformer's forward: computed, or made up; told to the engine either way."""

    def why_apart(self, given: dict[str, Any]) -> str | None:
        """Why a forward with these arguments is computed and nothing of it kept, or None."""
        return None

    @abstractmethod
    def compare(self, view: View, parts: Parts, verdict: Verdict) -> tuple[Tensor, Tensor]:
        """What a dry run would have made up, and what it computed."""

    def bytes_of(self, kind: str, tokens: int, text: int, itemsize: int) -> int | None:
        """Bytes of a kind of memory that only this boundary knows, or None."""
        return None

    @abstractmethod
    def clear(self) -> None:
        """Forget the forward under way."""
