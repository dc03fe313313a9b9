"""BlockAttention: sparse attention of the blocks that a step computes, by the rows of a plan that they have."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.guards import Attended
from dit_accel.methods import method_class, method_names
from dit_accel.planner import KeptPlan
from dit_accel.region.active import repeat_rows
from dit_accel.region.blocks import Blocks, take_query_blocks
from dit_accel.trajectory import Call, StateTable

if TYPE_CHECKING:
    from dit_accel.adapters.dispatch import Seat
    from dit_accel.engine import Engine
    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.region.engine import Forward
    from dit_accel.region.sampler import Sampler


class BlockAttention:
    """What `unit="block"` adds to one transformer's forwards.

    Args:
        engine: of sparse attention.
        sampler: chooses the blocks.

    Raises:
        UsageError: no sparse attention, or a method or an order that cannot.
    """

    def __init__(self, engine: Engine, sampler: Sampler) -> None:
        _check(engine)
        self._engine, self._sampler = weakref.ref(engine), sampler
        self._blocks: tuple[TokenLayout, Blocks] | None = None  # of the layout seen last
        self._shared = StateTable(engine.trajectory)  # plans of a step's first branch, where branches share them

    def blocks_of(self, now: Forward) -> Blocks | None:
        """The blocks that the step behind this forward may choose from; None where keys are not kept in their order."""
        layout = self._engine().layout
        if now.kept is None or layout is None or layout.grid != now.call.grid:
            return None
        if now.kept.order is not (None if layout.order == "raster" else layout):
            return None  # a fall-back left them in the model's order
        if self._blocks is None or self._blocks[0] is not layout:
            self._blocks = layout, Blocks.of(layout)
        return self._blocks[1]

    def attend(
        self,
        now: Forward,
        seat: Seat,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: dict[str, Any],
        first_head: int,
    ) -> Tensor | None:
        """Attend by the blocks' rows of a plan; None, and the reason counted, where the call is to be dense.

        Args:
            query: `[N, K, H, D]` of the active tokens; key and value `[N, S, H, D]` of all.
            first_head: the model's number of the first of these heads.
        """
        engine = self._engine()
        reason = engine.why_dense_part(seat, call)
        if reason is not None:
            engine.count_dense(*reason, 1)
            return None
        joint = query.shape[1] > now.active.n_video_tokens
        text = now.text if joint else 0
        layout = engine.layouts.of_call(key, text, engine.layout, 0)
        here = now.call.at(seat.layer, first_head)
        if now.text and not joint:  # the text takes no part in this attention
            here = replace(here, segments=(("video", 0, layout.n_video_tokens),))
        blocks = repeat_rows(self._sampler.chosen_blocks().to(query.device), len(query)) + layout.video_blocks.start
        if text:
            of_text = torch.arange(layout.n_blocks, device=query.device)[layout.text_blocks].expand(len(blocks), -1)
            blocks = torch.cat((of_text, blocks) if layout.text_first else (blocks, of_text), 1)
        held = key.numel() * key.element_size()  # the queries that are planned with

        def compute() -> Attended:
            plan = take_query_blocks(self._plan(now, here, query, key, layout), blocks, query.shape[1])
            return Attended(*engine.attending.attend_by(plan, query, key, value, call, here, layout, held))

        return engine.attending.attend_guarded(compute, seat, query, key, value, call, here)

    def _plan(self, now: Forward, here: Call, query: Tensor, key: Tensor, layout: TokenLayout) -> BlockPlan:
        """A plan of all query blocks, of which those without an active query are of no matter."""
        engine = self._engine()
        kept = None
        if engine.options.share_plans:
            kept = self._shared.get(replace(here, branch="every branch"), tuple(key.shape), KeptPlan)
            if kept.step == here.step:
                engine.tally.plans["carried over"] += 1
                return kept.plan()
        whole = query.new_zeros(key.shape)
        now.put(whole, query)
        plan = engine.planner.method_at(here).predict(whole, key, layout, here, None)
        engine.tally.plans["predicted"] += 1
        if kept is not None:
            kept.keep(plan, here)
        return plan

    def bytes_held(self) -> int:
        return self._shared.bytes_held()

    def clear(self) -> None:
        self._shared.clear()


def _check(engine: Engine) -> None:
    """Whether whole blocks can be chosen and attend sparsely.

    Raises:
        UsageError: no sparse attention, or a method or an order that cannot.
    """
    if engine.method is None:
        raise UsageError(
            "region option unit='block' chooses blocks of sparse attention, and there is none: give a method= and its "
            "budget, or unit='token'."
        )
    if not getattr(engine.method, "rows_apart", False):
        fit = [name for name in method_names() if getattr(method_class(name), "rows_apart", False)]
        raise UsageError(
            f"region option unit='block' needs a method that plans every query block for itself: {', '.join(fit)}. "
            "Choose one of these, or unit='token'."
        )
    if engine.layouts.arrangement.order == "tiles":
        raise UsageError(
            "region option unit='block' wants blocks of one size, and order='tiles' makes them of several: choose "
            "order='packed' or 'gilbert', or unit='token'."
        )
