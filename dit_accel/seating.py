"""Seating: where a transformer's attentions meet us. Seats on all of them, and what happens to their processors.

Others set processors too: `load_ip_adapter` puts its own in place of ours, an empty copy of ours may appear, a user may
set the stock ones again. Before each forward the seating looks at what is there.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from dit_accel.adapters import dispatch
from dit_accel.adapters.dispatch import Seat
from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from dit_accel.engine import Engine


@dataclass(frozen=True)
class Look:
    """What was found on the attentions before a forward."""

    cross: int  # attentions beside self-attention that run through us
    in_use: int  # self-attentions that do
    replaced: int  # self-attentions that did, or that somebody gave a processor that was not here before us
    stock: tuple[Any, ...]  # what runs in each self-attention, ours unwrapped


class Seating:
    """The seats of one transformer. Constructing takes them from an engine that is there.

    Args:
        engine: attends for every seat.
        transformer: whose attentions are seated.
        adapter: of its family.
        layers: path of each self-attention, and its number.

    Raises:
        UsageError: self-attentions whose processors do not use diffusers' dispatcher. Nothing has been touched then.
    """

    def __init__(self, engine: Engine, transformer: nn.Module, adapter: ModuleType, layers: dict[str, int]) -> None:
        self._engine, self._adapter = engine, adapter
        self._module = weakref.ref(transformer)
        self._set_once = False  # whether our processors were seen in place
        self._acted = False  # whether they were the last time
        attentions = {path: m for path, m in transformer.named_modules() if hasattr(m, "get_processor")}
        stocks = {path: _stock_of(path, attn) for path, attn in attentions.items()}
        inner = {path: self._dispatching(stocks[path]) for path in layers}
        for path in layers:
            if inner[path] is None:
                raise UsageError(
                    f"{path} has a {type(stocks[path]).__name__}, which does not use diffusers' attention "
                    "dispatcher. Set the stock processors again before making the attention sparse."
                )
        for earlier in {attn._dit_accel.owner for attn in attentions.values() if hasattr(attn, "_dit_accel")}:
            earlier.unhook()
        self._paths, self._attentions = list(attentions), None
        self.seats: list[Seat] = []
        for path, attn in attentions.items():
            attn._dit_accel = Seat(engine, stocks[path], layers.get(path), inner.get(path))
            self.seats.append(attn._dit_accel)

    def restore(self) -> None:
        """Give every attention the processor it had before us, and take the seats away."""
        for attn, seat in self._pairs():
            if _acts(attn, seat):
                attn.set_processor(seat.unwrap())
            del attn._dit_accel

    def settle(self) -> None:
        """Put processors with weights of their own back in place of ours, and follow an IP-Adapter that comes or goes.

        Loading or unloading one puts a processor in place of ours. It is no opting out where ours are set beside it.
        """
        pairs = self._pairs()
        if not any(_acts(attn, seat) for attn, seat in pairs) and not self._is_out_by_adapter(pairs):
            return
        self._set_once = self._acted = True
        for attn, seat in pairs:
            foreign = not _acts(attn, seat)
            if seat.layer is None or not (seat.has_weights or isinstance(attn.processor, nn.Module)):
                continue
            if foreign:
                inner = self._dispatching(attn.processor)
                if inner is None:
                    continue
                seat.serve(attn.processor, inner)
            attn.set_processor(seat.inner if seat.has_weights else _processor_of(self._engine))

    def look(self) -> Look:
        """What is set on the attentions, settled. Adopts empty processors of ours, notices replaced ones."""
        self.settle()
        cross = replaced = in_use = 0
        strange = False  # one that was not here before us, though ours may have come and gone unseen
        stock = []
        for attn, seat in self._pairs():
            ours = _acts(attn, seat)
            if ours and seat.has_weights:
                seat.open()
            if _is_ours(attn.processor) and attn.processor.engine is None:
                attn.processor.adopt(self._engine)
            if seat.layer is None:
                cross += ours
            else:
                in_use += ours
                replaced += not ours
                stock.append(seat.stock if ours else attn.processor)
                strange |= not ours and attn.processor is not seat.stock
        self._acted = in_use > 0
        return Look(cross, in_use, replaced if self._set_once or strange else 0, tuple(stock))

    def close(self) -> None:
        """Let processors with weights of their own look like the stock ones until the next forward."""
        for seat in self.seats:
            if seat.has_weights:
                seat.close()

    def acts_everywhere(self) -> bool:
        """Whether every self-attention runs through us."""
        return all(_acts(attn, seat) for attn, seat in self._pairs() if seat.layer is not None)

    def _dispatching(self, stock: Any) -> Any | None:
        return getattr(self._adapter, "dispatching", dispatch.dispatching)(stock)

    def _pairs(self) -> list[tuple[nn.Module, Seat]]:
        """Each attention with its seat. Those of an IP-Adapter's image projection may be gone."""
        if self._attentions is None:
            module = self._module()
            assert module is not None
            found = dict(module.named_modules())
            self._attentions = [weakref.ref(found[path]) if path in found else lambda: None for path in self._paths]
        pairs = zip((ref() for ref in self._attentions), self.seats, strict=True)
        return [(attn, seat) for attn, seat in pairs if attn is not None]

    def _is_out_by_adapter(self, pairs: list[tuple[nn.Module, Seat]]) -> bool:
        """Whether an IP-Adapter that came, went or changed put others in place of all of ours since the last look."""
        if not self._acted or not hasattr(self._adapter, "has_image_prompt"):
            return False
        found = [(attn.processor, seat) for attn, seat in pairs if seat.layer is not None]
        if self._adapter.has_image_prompt(self._module()):
            # The ones that stood there before, set again by hand, are an opting out.
            return all(isinstance(processor, nn.Module) and processor is not seat.stock for processor, seat in found)
        return all(seat.has_weights and not isinstance(processor, nn.Module) for processor, seat in found)

    def copy_to(self, engine: Engine, transformer: nn.Module | None, memo: dict) -> Seating:
        """The seats of a copied transformer, under a deep copy that is under way."""
        new = object.__new__(type(self))
        new._engine, new._adapter, new._paths, new._attentions = engine, self._adapter, self._paths, None
        new._module = (lambda: None) if transformer is None else weakref.ref(transformer)
        new._set_once, new._acted = False, self._acted
        new.seats = [copy.deepcopy(seat, memo) for seat in self.seats]
        return new


def _is_ours(processor: Any) -> bool:
    from dit_accel.processor import SparseProcessor

    return isinstance(processor, SparseProcessor)


def _acts(attn: nn.Module, seat: Seat) -> bool:
    """Whether an attention runs through us: by our processor, or by one with weights of its own that leads to us."""
    return _is_ours(attn.processor) or (seat.has_weights and attn.processor is seat.inner)


def _processor_of(engine: Engine) -> Any:
    from dit_accel.processor import SparseProcessor

    return SparseProcessor.of(engine)


def _stock_of(path: str, attn: nn.Module) -> Any:
    """The processor that was there before us, however often we came."""
    if hasattr(attn, "_dit_accel"):
        return attn._dit_accel.unwrap() if _acts(attn, attn._dit_accel) else attn.processor
    if _is_ours(attn.processor):
        raise UsageError(f"{path} has a SparseProcessor made for another transformer; set its own first.")
    return attn.processor
