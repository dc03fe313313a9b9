"""RegionForwards: one transformer's forwards under region sampling, and what is kept of them. It knows no host.

Which tokens a forward computes, what is kept of the others, and how the computed ones attend to these. A host's own
class takes the tokens out and puts them back: `RegionEngine` for diffusers, `integrations/comfyui` for ComfyUI.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.region.active import ActiveTokens, repeat_rows, write_rows
from dit_accel.region.block_attention import BlockAttention
from dit_accel.region.chooser import Chooser, TokenMap
from dit_accel.trajectory import Call, Facts

if TYPE_CHECKING:
    from dit_accel.forwards import Forwards, Place
    from dit_accel.layout import TokenLayout

_REASON = "region sampling: the queries are a part of the tokens"
_GIB = 2**30


@dataclass
class Kept:
    """What is kept of one branch."""

    signature: tuple  # of the forwards it comes from
    # fp32, each token's as it was computed last: [N, S, P] as it left the transformer, or as the host has latents
    velocity: Tensor | None = None
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> key, value, each [N, S, H, D]
    order: TokenLayout | None = None  # in which these stand; None: the model's own
    step: int | None = None  # at which the branch was seen last

    def bytes_held(self) -> int:
        tensors = [x for pair in self.keys.values() for x in pair]
        tensors += [] if self.velocity is None else [self.velocity]
        return sum(x.numel() * x.element_size() for x in tensors)


@dataclass
class Forward:
    """The forward under way."""

    call: Call
    kept: Kept | None  # None: of an unknown branch
    reason: str | None  # why every token is computed; None: only the active ones are
    stores: bool  # whether keys and values are kept of it
    video: slice  # where the tokens of image or video stand in its joint attentions
    text: int  # text tokens of these
    index: Tensor | None = None  # the active tokens, int64 [B, K] by row of the latents
    active: ActiveTokens | None = None
    places: Tensor | None = None  # of the active tokens among the kept keys of image or video, [N, K]
    made_up: bool = False  # by a step cache
    attended: set[int] = field(default_factory=set)  # layers whose active tokens read what is kept

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write a call's active tokens and text, `[N, K, H, D]`, where they stand among all, `[N, S, H, D]`."""
        joint = part.shape[1] > self.active.n_video_tokens
        if not joint:
            write_rows(whole, self.places, part)
        else:
            write_rows(whole, self.places + self.video.start, part[:, self.video])
            text = slice(0, self.text) if self.video.start else slice(-self.text, None)
            whole[:, text] = part[:, text]


class RegionForwards:
    """Region sampling on one transformer.

    Args:
        forwards: the transformer's, with sparse attention or without.
        chooser: chooses the tokens; shared by the experts of one pipeline.
        name: what the transformer is called.

    Raises:
        UsageError: fewer layers than asked for, or blocks of a sparse attention that has none to choose.
    """

    def __init__(self, forwards: Forwards, chooser: Chooser, name: str) -> None:
        self.region, self.chooser = chooser.region_of(forwards.role), chooser
        self._forwards = weakref.ref(forwards)
        if (self.region.layers or 0) > forwards.n_layers:
            raise UsageError(
                f"region option layers={self.region.layers}, but {name} has {forwards.n_layers} layers with "
                "self-attention: give at most that, or leave it out for all."
            )
        self._first_layer = forwards.n_layers - (self.region.layers or forwards.n_layers)
        self._by_blocks = BlockAttention(forwards, chooser) if self.region.unit == "block" else None
        self._kept: dict[str, Kept] = {}
        self._size: tuple[int, int, int, int] | None = None  # of the forward seen last, as `declare` takes it
        self._forward: Forward | None = None
        forwards.trajectory.on_new_run(self.forget)

    # -- of a host

    def _tokens(self) -> TokenMap:
        """Where the tokens of the forward under way lie in its latents."""
        raise NotImplementedError

    def declare(self, rows: int, tokens: int, text: int, itemsize: int) -> int:
        """Bytes that are kept of one branch; by each process, where several share the work.

        Args:
            rows: of the batch, as the transformer sees it.
            tokens, text: of image or video, and of text that attends with them, in each row.
            itemsize: bytes of a key's number.
        """
        raise NotImplementedError

    def _why_uneven(self) -> str | None:
        """Why the tokens that were chosen cannot be shared out among processes, or None."""
        return None

    def _least(self, number: int, device: torch.device) -> int:
        """The least of the numbers that the processes have which share the sequence."""
        return number

    def _attend_whole(
        self, place: Any, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any], attend: Callable[..., Tensor]
    ) -> Tensor:
        """Attend to whole sequences; `attend` also takes the number of the first head it is given."""
        return attend(query, key, value, 0)

    # -- memory

    def bytes_held(self) -> int:
        """Memory kept between forwards."""
        held = 0 if self._by_blocks is None else self._by_blocks.bytes_held()
        return held + sum(kept.bytes_held() for kept in self._kept.values())

    def needs(self) -> tuple[str, int]:
        """What this is called, and the bytes it declares for each branch of forwards like the last; 0 without one."""
        size = 0 if self._size is None else self.declare(*self._size)
        return f"region sampling of {self._forwards().role}, for each branch", size

    # -- around one forward

    def _decide(
        self, call: Call, facts: Facts, latents: Tensor, itemsize: int, reason: str | None
    ) -> ActiveTokens | None:
        """Decide which tokens a forward computes; None: all.

        Args:
            latents: `[N, ...]`, which it is given.
            itemsize: bytes of a key's number.
            reason: why it can neither leave tokens out nor be kept for one that does, or None.

        Raises:
            UsageError: what would be kept does not fit into memory.
        """
        tokens = math.prod(facts.grid)
        self._size = len(latents), tokens, facts.text, itemsize
        first = facts.text if facts.text_first else 0
        kept = None
        if reason is None:
            self.chooser.hold(self)
            signature = (tuple(latents.shape), latents.dtype, latents.device, tokens, facts.text)
            kept = self._kept.get(call.branch)
            if kept is None or kept.signature != signature:
                kept = self._kept[call.branch] = Kept(signature)
                self._check_memory(call, latents.device)
            reason = self.chooser.why_whole(call) or self._why_lacking(kept, call) or self._why_uneven()
            kept.step = call.step
        stores = kept is not None and reason is not None and self.chooser.may_follow(call)
        now = Forward(call, kept, reason, stores, slice(first, first + tokens), facts.text)
        self._forward = now
        if reason is not None:
            if kept is not None:
                self._prepare(kept, now)
            return None
        now.index = self.chooser.chosen().to(latents.device)
        index = repeat_rows(now.index, len(latents))
        now.active = ActiveTokens(facts.grid, index, kept.velocity)
        now.video = slice(first, first + index.shape[1])
        now.places = index if kept.order is None else kept.order.backward.to(index.device)[index]
        return now.active

    def _prepare(self, kept: Kept, now: Forward) -> None:
        """Before a forward that computes every token: what was kept goes, unless it will be written over."""
        if not now.stores:
            kept.velocity = None
        if not now.stores or self.region.keys == "drop":
            kept.keys.clear()

    def attend(self, seat: Place, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> Tensor | None:
        """One self-attention: the active queries', to all that is kept; None where every token is computed.

        Args:
            query: `[N, K, H, D]`, post-RoPE; as are key and value. Under context parallelism the process's share of
                these; keys and values are then kept of the heads that it attends with, of all tokens.
        """
        now, forwards = self._forward, self._forwards()
        if now is None or now.kept is None or now.active is None:
            return None
        kept_here = self._keeps_of(seat.layer)
        linear = forwards.is_linear(seat.layer) and forwards.why_dense_part(seat, call) is None

        def attend(query: Tensor, key: Tensor, value: Tensor, first_head: int) -> Tensor:
            now.attended.add(seat.layer)
            if kept_here:
                key, value = self._update(now, seat.layer, key, value)
            if linear:
                return forwards.attending.attend_linearly(query, key, value, call, now.call.at(seat.layer), seat)
            if self._by_blocks is not None and kept_here:
                out = self._by_blocks.attend(now, seat, query, key, value, call, first_head)
                if out is not None:
                    return out
            else:
                forwards.count_dense(_REASON, True, 1)
            return forwards.attending.attend_densely(seat, query, key, value, True, call, whole=True)

        return self._attend_whole(seat, query, key, value, call, attend)

    def keeps(self, layer: int) -> bool:
        """Whether a self-attention of all tokens under way is to `store` its keys and values."""
        now = self._forward
        return now is not None and now.active is None and now.stores and self._keeps_of(layer)

    def _keeps_of(self, layer: int) -> bool:
        return self.region.keys == "cached" and layer >= self._first_layer

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep a copy: what runs behind this may use the memory of its operands for something else.

        Args:
            key: `[N, S, H, D]`, of all tokens; as is value.
        """
        now = self._forward
        now.kept.order = self._forwards().order
        pair = now.kept.keys.get(layer)
        if pair is not None and pair[0].shape == key.shape and pair[0].dtype == key.dtype:
            pair[0].copy_(key), pair[1].copy_(value)
        else:
            now.kept.keys[layer] = key.contiguous().clone(), value.contiguous().clone()

    def _update(self, now: Forward, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the active tokens' and the text's keys and values over those kept, and return them all.

        In place: a forward that breaks off ends its run, and with it all that is kept.
        """
        pair = now.kept.keys[layer]
        for kept, new in zip(pair, (key, value), strict=True):
            now.put(kept, new)
        return pair

    def skip(self) -> None:
        """Note that a step cache makes this forward up."""
        if self._forward is not None:
            self._forward.made_up = True

    def leave(self) -> None:
        """The forward returned: tell the chooser what was computed, and count it."""
        now, self._forward = self._forward, None
        if now is None:
            return
        if now.made_up:
            self.chooser.note_made_up(self._tokens(), now.call)
            return
        blocks = None if self._by_blocks is None else self._by_blocks.blocks_of(now)
        self.chooser.note_forward(self._tokens(), now.call, now.index, blocks)
        whole = math.prod(now.call.grid)
        active, held = whole if now.index is None else now.index.shape[1], self.bytes_held()
        self._forwards().tally.note_region(active, whole, now.reason, held + self.chooser.bytes_held())

    # -- why not

    def _why_lacking(self, kept: Kept, call: Call) -> str | None:
        """Why a step that was to leave tokens out cannot, or None."""
        if kept.step is not None and call.step > kept.step + 1:
            return "the branch was away for a step"  # its velocities are older than the choice of tokens knows
        if kept.velocity is None:
            return "nothing is kept of this branch yet"
        layers = self._forwards().n_layers - self._first_layer
        if self.region.keys == "cached" and len(kept.keys) < layers:
            return "nothing is kept of this branch yet"
        return None

    def _check_memory(self, call: Call, device: torch.device) -> None:
        """Before anything is kept of a branch.

        Raises:
            UsageError: all branches' memory is more than there is.
        """
        if not self.chooser.leaves_out(call):
            return
        one = self.declare(*self._size)
        held = self.bytes_held()
        need = one * len(self._kept) - held
        free = self._free(device)
        if free is None:
            return
        spare = free - need - (held if self.region.memory is not None else 0)
        # one process that ended here alone would leave the others waiting for it
        if self._least(spare, device) >= 0:
            return
        self._kept.clear()
        raise UsageError(
            f"Region sampling would keep {(need + held) / _GIB:.3g} GiB for {(need + held) // one} branch(es) of "
            f"guidance ({self._size[1]} tokens, keys={self.region.keys!r}), and {free / _GIB:.3g} GiB are there. Use "
            "keys='drop', which keeps velocities alone; layers=, which keeps the keys of the last layers only; fewer "
            "frames or a smaller size; or no region sampling."
        )

    def _free(self, device: torch.device) -> int | None:
        """Bytes that may be kept: as asked for, or what is free on a CUDA device; None elsewhere, where none knows."""
        if self.region.memory is not None:
            return int(self.region.memory * _GIB)
        if device.type != "cuda":
            return None
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + spare

    def forget(self) -> None:
        """Drop all that is kept: a new run, one that broke off, or another expert's turn."""
        self._kept.clear()
        if self._by_blocks is not None:
            self._by_blocks.clear()
        self._forward = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._kept)} branches, {self.bytes_held()} bytes)"
