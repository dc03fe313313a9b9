"""One call of ComfyUI's attention, as an override of it gets it, and as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# An override takes the attention function it stands before, and then what that takes.
Override = Callable[..., Tensor]
_NAMES = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")


class AttentionCall:
    """One attention of a model: its tensors with heads apart, and the way to ComfyUI's own attention.

    Args:
        function: ComfyUI's attention function.
        before: the override that was there before ours, which then attends densely; None: there was none.
        args, kwargs: what the function takes.
    """

    splits = False  # ComfyUI shares no sequence out over processes

    def __init__(
        self, function: Callable[..., Tensor], before: Override | None, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        self._function, self._before, self._args, self._kwargs = function, before, args, kwargs
        self._named = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        self.layer = -1  # which self-attention this is, once that is known

    @property
    def title(self) -> str:
        name = getattr(self._function, "__name__", type(self._function).__name__)
        return f"ComfyUI ({name})" if self._before is None else f"ComfyUI ({name}, through another override)"

    @property
    def others(self) -> dict[str, Any]:
        """The other arguments, by the engine's names."""
        named = self._named
        return {
            "attn_mask": named.get("mask"),
            "dropout_p": 0.0,
            "is_causal": bool(named.get("is_causal")),
            "scale": named.get("scale"),
            "enable_gqa": bool(named.get("enable_gqa")),
        }

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `[B, S, H, D]` each."""
        query, key, value = (self._named[name] for name in "qkv")
        if self._named.get("skip_reshape"):  # [B, H, S, D]
            return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        width = query.shape[2] // self._named["heads"]
        # [B, S, H D], of fewer heads where these are shared; SD3's values have theirs apart already
        return tuple(x.reshape(*x.shape[:2], -1, width) for x in (query, key, value))

    def give(self, out: Tensor) -> Tensor:
        """`[B, S, H, D]` as this call is to return it."""
        return out.transpose(1, 2) if self._named.get("skip_output_reshape") else out.flatten(2)

    def as_called(self) -> Tensor:
        """What ComfyUI attends, by the very arguments it gave."""
        return self._attend(*self._args, **self._kwargs)

    def without_override(self) -> Tensor:
        """The same by ComfyUI's function alone."""
        return self._function(*self._args, **self._kwargs)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
        """What ComfyUI attends to other tensors, `[B, S, H, D]` each."""
        given = {**self._named, "skip_reshape": False, "skip_output_reshape": False, "heads": query.shape[2]}
        given |= {"q": query.flatten(2), "k": key.flatten(2), "v": value.flatten(2)}
        first = [given.pop(name) for name in _NAMES[:4]]
        return self._attend(*first, **given).unflatten(2, query.shape[2:])

    dense_whole = dense

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._before is None:
            return self._function(*args, **kwargs)
        return self._before(self._function, *args, **kwargs)
