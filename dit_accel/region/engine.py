"""RegionEngine: a diffusers transformer's forwards under region sampling.

It sits in the sparse attention's `Engine`, which wires the transformer: that one asks it at each forward which tokens
are computed, and hands it every self-attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.adapters import parallel, region_classes
from dit_accel.errors import UsageError
from dit_accel.layout import Grid
from dit_accel.region.active import ActiveTokens
from dit_accel.region.forwards import RegionForwards
from dit_accel.region.sampler import Sampler
from dit_accel.trajectory import Call, Facts

if TYPE_CHECKING:
    from dit_accel.adapters.dispatch import Seat
    from dit_accel.engine import Engine


@dataclass(frozen=True)
class AdapterTokens:
    """Where tokens lie in latents, as the adapter of their transformer's family knows."""

    adapter: ModuleType
    transformer: Callable[[], nn.Module | None]

    def patch_velocity(self, velocity: Tensor, grid: Grid) -> Tensor | None:
        transformer = self.transformer()
        return None if transformer is None else self.adapter.patch_velocity(transformer, velocity, grid)

    def spread_tokens(self, values: Tensor, grid: Grid) -> Tensor:
        return self.adapter.spread_tokens(self.transformer(), values, grid)

    def agree(self, chosen: Tensor) -> Tensor:
        return parallel.as_first(self.transformer(), chosen)


class RegionEngine(RegionForwards):
    """Region sampling on one transformer of diffusers.

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
        super().__init__(engine, sampler, name)
        self.sampler = sampler
        self._map = AdapterTokens(engine.adapter, weakref.ref(transformer))
        # behind the hook that brings tokens back into the model's order, if there is one
        self._handle: Any = transformer.proj_out.register_forward_hook(self._leave_tokens)
        engine.region = self

    def remove(self) -> None:
        """Take the hook away and forget everything. Does nothing the second time."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        engine = self._forwards()
        if engine is not None and engine.region is self:
            engine.region = None
        self.forget()

    def declare(self, rows: int, tokens: int, text: int, itemsize: int) -> int:
        transformer = self._forwards()._module()
        config, patch = transformer.config, transformer.proj_out.out_features
        velocity = rows * tokens * patch * 4
        if self.region.keys == "drop":
            return velocity
        adapter = self._forwards().adapter
        sees_text = getattr(adapter, "sees_text", lambda path: True)
        layers = [path for path, layer in adapter.self_attentions(transformer) if layer >= self._first_layer]
        keys = sum(tokens + text * sees_text(path) for path in layers)
        heads = parallel.heads_here(transformer, config.num_attention_heads)
        return velocity + 2 * keys * rows * heads * config.attention_head_dim * itemsize

    def enter(self, call: Call, facts: Facts, given: dict[str, Any]) -> ActiveTokens | None:
        """Decide which tokens this forward computes; None: all.

        Raises:
            UsageError: what would be kept does not fit into memory.
        """
        self.sampler.follow_scheduler()
        hidden = given["hidden_states"]
        return self._decide(call, facts, hidden, hidden.element_size(), self._why_never(call, facts, given))

    @torch.compiler.disable
    def _leave_tokens(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Note each token's velocity as it leaves the transformer, `[N, S, P]` in the model's order."""
        now = self._forward
        if now is not None and now.kept is not None and (now.stores or now.active is not None):
            now.kept.velocity = output.detach().to(torch.float32, copy=True)

    def _tokens(self) -> AdapterTokens:
        return self._map

    def _attend_whole(
        self,
        place: Seat,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: dict[str, Any],
        attend: Callable[..., Tensor],
    ) -> Tensor:
        return parallel.attend_whole(place.stock, query, key, value, call["scale"], attend)

    def _least(self, number: int, device: torch.device) -> int:
        return parallel.least(self._forwards()._module(), number, device)

    def _why_never(self, call: Call, facts: Facts, given: dict[str, Any]) -> str | None:
        """Why this forward can neither leave tokens out nor be kept for one that does, or None."""
        engine = self._forwards()
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

    def _why_uneven(self) -> str | None:
        tokens, module = self.chooser.chosen().shape[1], self._forwards()._module()
        degree = parallel.shares_of(module, tokens)
        return f"context parallelism: {tokens} tokens, which {degree} processes cannot share evenly" if degree else None
