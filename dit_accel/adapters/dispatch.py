"""The way into diffusers' attention dispatcher, and out of it again.

diffusers' processors hand post-norm, post-RoPE query, key and value to `dispatch_attention_fn`, which looks a
function up by backend name. Ours is found under a member of that enum which is *unlisted*: it exists, and
diffusers' registry of functions knows it, but no map of the enum does. So it cannot be set by name, cannot
leak into the process-wide default, and users of the enum never see it. That registry entry is the one
process-wide object of this package; it also owns the table of seats, through which the opaque op finds its
Python side.

The dispatcher passes `parallel_config` through unopened. A seat rides in that slot, which tells our function
whose attention it serves without a global, a context variable or a line of copied processor.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import attention_dispatch as host
from torch import Tensor, nn

logger = logging.getLogger("dit_accel")

NAME = "dit_accel"
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor seat, float dropout_p, bool is_causal, "
    "float? scale, bool enable_gqa) -> Tensor"
)


class Seat:
    """What is known about one attention module; kept on it as `_dit_accel` and removed with us.

    Args:
        owner: attends for this seat (an `Engine`).
        stock: the processor that was there before us; never changed.
        layer: which self-attention this is, or None if it is not one (the stock processor then runs).
        inner: for a self-attention, a processor like the stock one whose calls go through diffusers' dispatcher; it
            becomes this seat's own.
    """

    def __init__(self, owner: Any, stock: Any, layer: int | None, inner: Any = None) -> None:
        self.owner, self.layer = owner, layer
        self.serve(stock, stock if layer is None else inner)
        # A tensor, because torch.compile would make one graph per layer out of Python numbers. Always on the
        # CPU, also under `with torch.device("meta")`.
        self.key = torch.tensor(_entry().add(self), device="cpu")

    def serve(self, stock: Any, inner: Any) -> None:
        """Take a stock processor, and the one that runs in its place, instead of those before."""
        self.stock, self.inner = stock, inner
        self.accepts = frozenset(inspect.signature(stock.__call__).parameters)
        if self.layer is not None and not self.has_weights:
            self.open()

    @property
    def has_weights(self) -> bool:
        """Whether a self-attention's processor has weights of its own, as an IP-Adapter's.

        Such a one must stay among the model's modules, where it is moved, cast, saved, told its scale: `inner`, which
        shares them with the stock one, then is the attention's processor itself. diffusers takes any parallel config on
        it for context parallelism, so that it leads to us in forwards only.
        """
        return self.layer is not None and isinstance(self.inner, nn.Module)

    def open(self) -> None:
        """Lead `inner` to our function. What diffusers set on one that is in place goes to the stock processor."""
        for name, own in (("_attention_backend", slot()), ("_parallel_config", self)):
            value = getattr(self.inner, name, own)
            if self.has_weights and value is not own and value is not getattr(self.stock, name, value):
                setattr(self.stock, name, value)
            setattr(self.inner, name, own)

    def close(self) -> None:
        """Let `inner` look like the stock processor."""
        for name in ("_attention_backend", "_parallel_config"):
            if hasattr(self.stock, name):
                setattr(self.inner, name, getattr(self.stock, name))
            else:  # it calls torch's own attention, and diffusers shall find nothing to set
                vars(self.inner).pop(name, None)

    def unwrap(self) -> Any:
        """The stock processor, with all that was set on the one in its place."""
        if self.has_weights:
            self.open()
            ours = ("_attention_backend", "_parallel_config")
            vars(self.stock).update({name: x for name, x in vars(self.inner).items() if name not in ours})
            self.close()
        return self.stock

    def dense(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        """What diffusers would have computed here, with the backend the stock processor has."""
        config = getattr(self.stock, "_parallel_config", None)
        return dense(query, key, value, backend=self._chosen(), parallel_config=config, **call)

    def dense_whole(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        """As `dense`, of whole sequences: what context parallelism exchanges has been exchanged."""
        return dense(query, key, value, backend=self._chosen(), parallel_config=None, **call)

    @property
    def title(self) -> str:
        """Which backend `dense` runs, for the report."""
        chosen = _host_backend(self._chosen())
        return f"diffusers ({getattr(chosen, 'value', chosen)})"

    @property
    def splits(self) -> bool:
        """Whether diffusers was told to share out the sequence over processes here."""
        return getattr(self.stock, "_parallel_config", None) is not None

    def _chosen(self) -> Any:
        # A stock processor without the attribute calls torch's own attention, whatever was chosen for the process.
        return getattr(self.stock, "_attention_backend", host.AttentionBackendName.NATIVE)

    def __deepcopy__(self, memo: dict) -> Seat:
        new = memo[id(self)] = object.__new__(type(self))
        stock = copy.deepcopy(self.stock, memo)
        memo[id(slot())] = slot()  # an unlisted member cannot be looked up again
        # Copied behind the stock processor, so that what the two share is shared by their copies too.
        inner = None if self.layer is None else copy.deepcopy(self.inner, memo)
        new.__init__(copy.deepcopy(self.owner, memo), stock, self.layer, inner)
        return new


class _Entry:
    """Owned by diffusers' registry entry: hands out seat numbers and forgets seats that died."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._seats: weakref.WeakValueDictionary[int, Seat] = weakref.WeakValueDictionary()

    def add(self, seat: Seat) -> int:
        number = next(self._numbers)
        self._seats[number] = seat
        return number

    def find(self, number: int) -> Seat:
        return self._seats[number]


def slot() -> host.AttentionBackendName:
    """The unlisted backend member that leads to `attend`; placed in diffusers' registry at first use."""
    registry = host._AttentionBackendRegistry
    for member in registry._backends:
        if member.value == NAME:
            return member
    member = str.__new__(host.AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    registry.register(member)(_function_for(_Entry()))
    return member


def dispatching(stock: Any) -> Any | None:
    """A copy of a stock processor that goes through diffusers' dispatcher; None for one that does not."""
    return copy.copy(stock) if hasattr(stock, "_attention_backend") else None


def dense(
    query: Tensor, key: Tensor, value: Tensor, *, backend: Any, parallel_config: Any, **call: Any
) -> Tensor:
    """Dispatch to a backend that is not ours.

    Args:
        query: `[B, S, H, D]`, as are key, value and the result.
        backend: a member of diffusers' enum; None for the process's choice.
        call: the dispatcher's other arguments by name.
    """
    call |= {"backend": _host_backend(backend), "parallel_config": parallel_config}
    return host.dispatch_attention_fn(query, key, value, **call)


def _host_backend(backend: Any) -> Any:
    chosen = backend if backend is not None else host._AttentionBackendRegistry.get_active_backend()[0]
    # Ours would come straight back here.
    return host.AttentionBackendName.NATIVE if chosen == NAME else chosen


def _function_for(entry: _Entry) -> Callable[..., Tensor]:
    """The function that diffusers' registry calls. The dispatcher passes exactly the arguments named here."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        seat = _parallel_config
        call = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if not isinstance(seat, Seat):
            logger.warning("dit_accel's attention was reached without a SparseProcessor: this runs dense.")
            return dense(query, key, value, backend=None, parallel_config=seat, enable_gqa=enable_gqa, **call)
        query, key, value = _as_autocast(query, key, value)
        if torch.is_grad_enabled() and getattr(seat.owner, "trains", False):
            # The opaque op has no gradients.
            return _attend_openly(seat, query, key, value, enable_gqa=enable_gqa, **call)
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            # The sparse kernels have no backward. Counted by the owner, once per forward.
            return seat.dense(query, key, value, enable_gqa=enable_gqa, **call)
        return torch.ops.dit_accel.attend(
            query, key, value, attn_mask, seat.key, dropout_p, is_causal, scale, enable_gqa
        )

    attend.entry = entry
    return attend


def _entry() -> _Entry:
    return host._AttentionBackendRegistry._backends[slot()].entry


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast hands them to torch's own attention: all of its type."""
    kind = tensors[0].device.type
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors) if torch.is_autocast_enabled(kind) else tensors


@torch.compiler.disable
def _attend_openly(seat: Seat, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
    """Attend where autograd sees it; torch.compile breaks its graph here."""
    with _without_autocast(query):
        return seat.owner.attend(seat, query, key, value, **call)


def _without_autocast(query: Tensor) -> torch.autocast:
    """Scores and sums of ours have the precision they are written in."""
    return torch.autocast(query.device.type, enabled=False)


@torch.library.custom_op("dit_accel::attend", mutates_args=(), schema=_SCHEMA)
def _attend(query, key, value, mask, seat, dropout_p, is_causal, scale, enable_gqa):
    """Opaque to torch.compile: everything that changes from step to step is read in here."""
    seat = _entry().find(int(seat))
    call = {"attn_mask": mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    with _without_autocast(query):
        out = seat.owner.attend(seat, query, key, value, enable_gqa=enable_gqa, **call)
    return out.contiguous()  # as `_shape_of_attend` promises; the host's next step would copy otherwise


@_attend.register_fake
def _shape_of_attend(query, key, value, mask, seat, dropout_p, is_causal, scale, enable_gqa):
    return query.new_empty(*query.shape[:3], value.shape[-1])
