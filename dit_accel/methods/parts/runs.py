"""Runs: plans over tokens that a method puts in orders of its own, cut every `block` tokens.

Whatever the layout's order and blocks are, the video's tokens are cut into runs of `layout.block` and the text behind
them into runs of its own, on both sides: blocks of one size are what every executor takes and wastes least of.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.plan import BlockPlan


def count_runs(layout: TokenLayout) -> tuple[int, int]:
    """How many runs hold video, and how many text."""
    return math.ceil(layout.n_video_tokens / layout.block), math.ceil(layout.text / layout.block)


def run_starts(layout: TokenLayout) -> Tensor:
    """First position of each run and the end, int32 `[1, 1, N + 1]`; the layout remembers it."""
    key = ("runs", "starts")
    if key not in layout.memo:
        steps = [range(0, layout.n_video_tokens, layout.block)]
        steps += [range(layout.n_video_tokens, layout.n_tokens, layout.block), (layout.n_tokens,)]
        starts = torch.tensor([start for part in steps for start in part], dtype=torch.int32)
        layout.memo[key] = starts.view(1, 1, -1).to(layout.starts.device)
    return layout.memo[key]


def run_sizes(layout: TokenLayout) -> Tensor:
    """Tokens of each run, int32 `[1, 1, N]`; the layout remembers it."""
    key = ("runs", "sizes")
    if key not in layout.memo:
        layout.memo[key] = run_starts(layout).diff(dim=-1)
    return layout.memo[key]


def text_pairs(layout: TokenLayout) -> Tensor | None:
    """Pairs of runs of which one holds text, bool `[N, N]`, which are always read; None without text."""
    video, text = count_runs(layout)
    if not text:
        return None
    key = ("runs", "text")
    if key not in layout.memo:
        pairs = torch.ones(video + text, video + text, dtype=torch.bool, device=layout.starts.device)
        pairs[:video, :video] = False
        layout.memo[key] = pairs
    return layout.memo[key]


def with_text(order: Tensor, layout: TokenLayout) -> Tensor:
    """An order of the video's tokens with the text's behind it as they came; int32 `[..., V]` to `[..., S]`."""
    if not layout.text:
        return order
    text = torch.arange(layout.n_video_tokens, layout.n_tokens, dtype=order.dtype, device=order.device)
    return torch.cat([order, text.expand(*order.shape[:-1], -1)], dim=-1)


def plan_of_runs(
    counts: Tensor, indices: Tensor, layout: TokenLayout, q_order: Tensor, k_order: Tensor
) -> BlockPlan:
    """The plan whose blocks are the runs of these orders.

    Args:
        counts: int32 `[B|1, H|1, N]`.
        indices: int32 `[B|1, H|1, N, M]`, read up to `counts`.
        q_order: int32 `[B|1, H|1, S]`, which token stands at each position; as is `k_order`.
    """
    starts = run_starts(layout).to(counts.device)
    longest = min(layout.block, max(layout.n_video_tokens, layout.text))
    # without text only the last run is short; with it also the video's last, if the block does not divide it
    even = not layout.text or layout.n_video_tokens % longest == 0
    return BlockPlan(
        counts=counts,
        indices=indices,
        q_starts=starts,
        k_starts=starts,
        n_q_tokens=layout.n_tokens,
        n_k_tokens=layout.n_tokens,
        max_q_block=longest,
        max_k_block=longest,
        even_k=even,
        even_q=even,
        q_order=q_order,
        k_order=k_order,
    )
