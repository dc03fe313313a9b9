"""RegionEngine: one transformer's forwards under region sampling, and what is kept of them.

It sits in the sparse attention's `Engine`, which wires the transformer: that one asks it at each forward which tokens
are computed, and hands it every self-attention.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.adapters import parallel, region_classes
from dit_accel.errors import UsageError
from dit_accel.region.active import ActiveTokens, repeat_rows, write_rows
from dit_accel.region.block_attention import BlockAttention
from dit_accel.region.sampler import Sampler
from dit_accel.trajectory import Call, Facts

if TYPE_CHECKING:
    from dit_accel.adapters.dispatch import Seat
    from dit_accel.engine import Engine
    from dit_accel.layout import TokenLayout

_REASON = "region sampling: the queries are a part of the tokens"
_GIB = 2**30


@dataclass
class Kept:
    """What is kept of one branch."""

    signature: tuple  # of the forwards it comes from
    velocity: Tensor | None = None  # fp32 [N, S, P], each token's as it was computed last
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> key, value, each [N, S, H, D]
    order: TokenLayout | None = None  # in which these stand; None: the model's own

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
    places: Tensor | None = None  # of the active tokens among the kept keys, [N, K]
    made_up: bool = False  # by a step cache

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write a call's active tokens and text, `[N, K, H, D]`, where they stand among all, `[N, S, H, D]`."""
        joint = part.shape[1] > self.active.n_video_tokens
        write_rows(whole, self.places, part[:, self.video] if joint else part)
        if joint:
            text = slice(0, self.text) if self.video.start else slice(-self.text, None)
            whole[:, text] = part[:, text]


class RegionEngine:
    """Region sampling on one transformer.

    Args:
        engine: of sparse attention, or of none, on the same transformer.
        sampler: chooses the tokens; shared by the experts of one pipeline.

    Raises:
        UsageError: a transformer of a family that cannot compute a part of its tokens, or fewer layers than asked for.
    """

    def __init__(self, engine: Engine, sampler: Sampler) -> None:
        transformer = engine._module()
        name = type(transformer).__name__
        if name not in getattr(engine.adapter, "REGION", ()):
            raise UsageError(
                f"Region sampling is not proven for {name}: leave `region` out. It runs on "
                f"{', '.join(region_classes())}."
            )
        self.region, self.sampler, self._engine = sampler.region_of(engine.role), sampler, weakref.ref(engine)
        if (self.region.layers or 0) > engine.n_layers:
            raise UsageError(
                f"region option layers={self.region.layers}, but {name} has {engine.n_layers} layers with "
                "self-attention: give at most that, or leave it out for all."
            )
        self._first_layer = engine.n_layers - (self.region.layers or engine.n_layers)
        self._by_blocks = BlockAttention(engine, sampler) if self.region.unit == "block" else None
        self._kept: dict[str, Kept] = {}
        self._size: tuple[int, int, int, int] | None = None  # of the forward seen last, as `declare` takes it
        self._forward: Forward | None = None
        # behind the hook that brings tokens back into the model's order, if there is one
        self._handle: Any = transformer.proj_out.register_forward_hook(self._leave_tokens)
        engine.trajectory.on_new_run(self.forget)
        engine.region = self

    def remove(self) -> None:
        """Take the hook away and forget everything. Does nothing the second time."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        engine = self._engine()
        if engine is not None and engine.region is self:
            engine.region = None
        self.forget()

    def bytes_held(self) -> int:
        """Memory kept between forwards."""
        held = 0 if self._by_blocks is None else self._by_blocks.bytes_held()
        return held + sum(kept.bytes_held() for kept in self._kept.values())

    def declare(self, rows: int, tokens: int, text: int, itemsize: int) -> int:
        """Bytes that are kept of one branch; by each process, where several share the work.

        Args:
            rows: of the batch, as the transformer sees it.
            tokens, text: of image or video, and of text that attends with them, in each row.
            itemsize: bytes of a key's number.
        """
        transformer = self._engine()._module()
        config, patch = transformer.config, transformer.proj_out.out_features
        velocity = rows * tokens * patch * 4
        if self.region.keys == "drop":
            return velocity
        adapter = self._engine().adapter
        sees_text = getattr(adapter, "sees_text", lambda path: True)
        layers = [path for path, layer in adapter.self_attentions(transformer) if layer >= self._first_layer]
        keys = sum(tokens + text * sees_text(path) for path in layers)
        heads = parallel.heads_here(transformer, config.num_attention_heads)
        return velocity + 2 * keys * rows * heads * config.attention_head_dim * itemsize

    def needs(self) -> tuple[str, int]:
        """What this is called, and the bytes it declares for each branch of forwards like the last; 0 without one."""
        size = 0 if self._size is None else self.declare(*self._size)
        return f"region sampling of {self._engine().role}, for each branch", size

    # -- around one forward

    def enter(self, call: Call, facts: Facts, given: dict[str, Any]) -> ActiveTokens | None:
        """Decide which tokens this forward computes; None: all.

        Raises:
            UsageError: what would be kept does not fit into memory.
        """
        self.sampler.follow_scheduler()
        hidden, tokens = given["hidden_states"], math.prod(facts.grid)
        self._size = len(hidden), tokens, facts.text, hidden.element_size()
        first = facts.text if facts.text_first else 0
        reason = self._why_never(call, facts, given)
        kept = None
        if reason is None:
            self.sampler.hold(self)
            signature = (tuple(hidden.shape), hidden.dtype, hidden.device, tokens, facts.text)
            kept = self._kept.get(call.branch)
            if kept is None or kept.signature != signature:
                kept = self._kept[call.branch] = Kept(signature)
                self._check_memory(call, hidden, tokens, facts.text)
            reason = self.sampler.why_whole(call) or self._why_lacking(kept) or self._why_uneven()
        stores = kept is not None and reason is not None and self.sampler.may_follow(call)
        now = Forward(call, kept, reason, stores, slice(first, first + tokens), facts.text)
        self._forward = now
        if reason is not None:
            if kept is not None:
                self._prepare(kept, now)
            return None
        now.index = self.sampler.chosen().to(hidden.device)
        index = repeat_rows(now.index, len(hidden))
        now.active = ActiveTokens(facts.grid, index, kept.velocity)
        now.video = slice(first, first + index.shape[1])
        now.places = index if kept.order is None else kept.order.backward.to(index.device)[index]
        now.places = now.places + first
        return now.active

    def _prepare(self, kept: Kept, now: Forward) -> None:
        """Before a forward that computes every token: what was kept goes, unless it will be written over."""
        if not now.stores:
            kept.velocity = None
        if not now.stores or self.region.keys == "drop":
            kept.keys.clear()

    def attend(self, seat: Seat, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> Tensor | None:
        """One self-attention: the active queries', to all that is kept; None where every token is computed.

        Args:
            query: `[N, K, H, D]`, post-RoPE; as are key and value. Under context parallelism the process's share of
                these; keys and values are then kept of the heads that it attends with, of all tokens.
        """
        now, engine = self._forward, self._engine()
        if now is None or now.kept is None or now.active is None:
            return None
        kept_here = self._keeps_of(seat.layer)
        linear = engine.is_linear(seat.layer) and engine.why_dense_part(seat, call) is None

        def attend(query: Tensor, key: Tensor, value: Tensor, first_head: int) -> Tensor:
            if kept_here:
                key, value = self._update(now, seat.layer, key, value)
            if linear:
                return engine.attending.attend_linearly(query, key, value, call, now.call.at(seat.layer), seat)
            if self._by_blocks is not None and kept_here:
                out = self._by_blocks.attend(now, seat, query, key, value, call, first_head)
                if out is not None:
                    return out
            else:
                engine.count_dense(_REASON, True, 1)
            return engine.attending.attend_densely(seat, query, key, value, True, call, whole=True)

        return parallel.attend_whole(seat.stock, query, key, value, call["scale"], attend)

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
        now.kept.order = self._engine().order
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

    @torch.compiler.disable
    def _leave_tokens(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Note each token's velocity as it leaves the transformer, `[N, S, P]` in the model's order."""
        now = self._forward
        if now is not None and now.kept is not None and (now.stores or now.active is not None):
            now.kept.velocity = output.detach().to(torch.float32, copy=True)

    def skip(self) -> None:
        """Note that a step cache makes this forward up."""
        if self._forward is not None:
            self._forward.made_up = True

    def leave(self) -> None:
        """The forward returned: tell the sampler what was computed, and count it."""
        now, self._forward = self._forward, None
        engine = self._engine()
        if now is None:
            return
        told = engine._module(), engine.adapter, now.call
        if now.made_up:
            self.sampler.note_made_up(*told)
            return
        blocks = None if self._by_blocks is None else self._by_blocks.blocks_of(now)
        self.sampler.note_forward(*told, now.index, blocks)
        whole = math.prod(now.call.grid)
        active, held = whole if now.index is None else now.index.shape[1], self.bytes_held()
        engine.tally.note_region(active, whole, now.reason, held + self.sampler.bytes_held())

    # -- why not

    def _why_never(self, call: Call, facts: Facts, given: dict[str, Any]) -> str | None:
        """Why this forward can neither leave tokens out nor be kept for one that does, or None."""
        engine = self._engine()
        module, hidden = engine._module(), given["hidden_states"]
        if call.branch is None:
            return "branch unknown"
        if torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in module.parameters())):
            return "gradients are needed"
        why_split = parallel.why_dense(module, engine.adapter, facts.text)
        if why_split is not None:
            return why_split
        adapter = engine.adapter
        asked = (adapter.why_raster, getattr(adapter, "why_dense", None), getattr(adapter, "why_whole", None))
        for why in (lambda *_: facts.loose, *asked):
            reason = None if why is None else why(module, given)
            if reason is not None:
                return reason
        if not engine.seating.acts_everywhere():
            return "a processor was replaced after installation"
        return None

    def _why_lacking(self, kept: Kept) -> str | None:
        """Why a step that was to leave tokens out cannot, or None."""
        if kept.velocity is None:
            return "nothing is kept of this branch yet"
        layers = self._engine().n_layers - self._first_layer
        if self.region.keys == "cached" and len(kept.keys) < layers:
            return "nothing is kept of this branch yet"
        return None

    def _why_uneven(self) -> str | None:
        """Why the tokens that were chosen cannot be shared out among processes, or None."""
        tokens, module = self.sampler.chosen().shape[1], self._engine()._module()
        degree = parallel.shares_of(module, tokens)
        return f"context parallelism: {tokens} tokens, which {degree} processes cannot share evenly" if degree else None

    def _check_memory(self, call: Call, hidden: Tensor, tokens: int, text: int) -> None:
        """Before anything is kept of a branch.

        Raises:
            UsageError: all branches' memory is more than there is.
        """
        if not self.sampler.leaves_out(call):
            return
        one = self.declare(len(hidden), tokens, text, hidden.element_size())
        held = self.bytes_held()
        need = one * len(self._kept) - held
        free = self._free(hidden.device)
        if free is None:
            return
        spare = free - need - (held if self.region.memory is not None else 0)
        # one process that ended here alone would leave the others waiting for it
        if parallel.least(self._engine()._module(), spare, hidden.device) >= 0:
            return
        self._kept.clear()
        raise UsageError(
            f"Region sampling would keep {(need + held) / _GIB:.3g} GiB for {(need + held) // one} branch(es) of "
            f"guidance ({tokens} tokens, keys={self.region.keys!r}), and {free / _GIB:.3g} GiB are there. Use "
            "keys='drop', which keeps velocities alone; layers=, which keeps the keys of the last layers only; fewer "
            "frames or a smaller size; or region=False."
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
        return f"RegionEngine({len(self._kept)} branches, {self.bytes_held()} bytes)"
