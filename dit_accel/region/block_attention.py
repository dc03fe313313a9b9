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
    from dit_accel.forwards import Forwards, Place
    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.region.chooser import Chooser
    from dit_accel.region.forwards import Forward


class BlockAttention:
    """What `unit="block"` adds to one transformer's forwards.

    Args:
        forwards: with sparse attention.
        chooser: chooses the blocks.

    Raises:
        UsageError: no sparse attention, or a method or an order that cannot.
    """

    def __init__(self, forwards: Forwards, chooser: Chooser) -> None:
        _check(forwards)
        self._forwards, self._chooser = weakref.ref(forwards), chooser
        self._blocks: tuple[TokenLayout, Blocks] | None = None  # of the layout seen last
        self._shared = StateTable(forwards.trajectory)  # plans of a step's first branch, where branches share them

    def blocks_of(self, now: Forward) -> Blocks | None:
        """The blocks that the step behind this forward may choose from; None where keys are not kept in their order."""
        layout = self._forwards().layout
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
        seat: Place,
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
        forwards = self._forwards()
        reason = forwards.why_dense_part(seat, call)
        if reason is not None:
            forwards.count_dense(*reason, 1)
            return None
        joint = query.shape[1] > now.active.n_video_tokens
        text = now.text if joint else 0
        layout = forwards.layouts.of_call(key, text, forwards.layout, 0)
        here = now.call.at(seat.layer, first_head)
        if now.text and not joint:  # the text takes no part in this attention
            here = replace(here, segments=(("video", 0, layout.n_video_tokens),))
        blocks = repeat_rows(self._chooser.chosen_blocks().to(query.device), len(query)) + layout.video_blocks.start
        if text:
            of_text = torch.arange(layout.n_blocks, device=query.device)[layout.text_blocks].expand(len(blocks), -1)
            blocks = torch.cat((of_text, blocks) if layout.text_first else (blocks, of_text), 1)
        held = key.numel() * key.element_size()  # the queries that are planned with

        def compute() -> Attended:
            plan = take_query_blocks(self._plan(now, here, query, key, layout), blocks, query.shape[1])
            return Attended(*forwards.attending.attend_by(plan, query, key, value, call, here, layout, held))

        return forwards.attending.attend_guarded(compute, seat, query, key, value, call, here)

    def _plan(self, now: Forward, here: Call, query: Tensor, key: Tensor, layout: TokenLayout) -> BlockPlan:
        """A plan of all query blocks, of which those without an active query are of no matter."""
        forwards = self._forwards()
        kept = None
        if forwards.options.share_plans:
            kept = self._shared.get(replace(here, branch="every branch"), tuple(key.shape), KeptPlan)
            if kept.step == here.step:
                forwards.tally.plans["carried over"] += 1
                return kept.plan()
        whole = query.new_zeros(key.shape)
        now.put(whole, query)
        plan = forwards.planner.method_at(here).predict(whole, key, layout, here, None)
        forwards.tally.plans["predicted"] += 1
        if kept is not None:
            kept.keep(plan, here)
        return plan

    def bytes_held(self) -> int:
        return self._shared.bytes_held()

    def clear(self) -> None:
        self._shared.clear()


def _check(forwards: Forwards) -> None:
    """Whether whole blocks can be chosen and attend sparsely.

    Raises:
        UsageError: no sparse attention, or a method or an order that cannot.
    """
    if forwards.method is None:
        raise UsageError(
            "region option unit='block' chooses blocks of sparse attention, and there is none: give a method= and its "
            "budget, or unit='token'."
        )
    if not getattr(forwards.method, "rows_apart", False):
        fit = [name for name in method_names() if getattr(method_class(name), "rows_apart", False)]
        raise UsageError(
            f"region option unit='block' needs a method that plans every query block for itself: {', '.join(fit)}. "
            "Choose one of these, or unit='token'."
        )
    if forwards.layouts.arrangement.order == "tiles":
        raise UsageError(
            "region option unit='block' wants blocks of one size, and order='tiles' makes them of several: choose "
            "order='packed' or 'gilbert', or unit='token'."
        )
