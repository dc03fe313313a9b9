"""Runs: plans over tokens that a method puts in orders of its own, cut every `block` tokens.

Whatever the layout's order and blocks are, the video's tokens come first and are cut into runs of `layout.block`, the
text's behind them into runs of their own: blocks of one size are what every executor takes and wastes least of.
Queries may also be cut where clusters of them begin.
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


def with_text(order: Tensor, layout: TokenLayout) -> Tensor:
    """An order of the video's tokens among themselves, as one of all tokens with the text's behind as they came.

    int32 `[..., V]` to `[..., S]`.
    """
    if not layout.text:
        return order
    places = layout.text_tokens
    text = torch.arange(places.start, places.stop, dtype=order.dtype, device=order.device)
    return torch.cat([order + layout.video_tokens.start, text.expand(*order.shape[:-1], -1)], dim=-1)


def cut_clusters(starts: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Blocks of queries that begin with each cluster, and again every `layout.block` tokens in it; then the text's.

    As many blocks as there may be at most: those that are not needed hold no token, and stand before the text's.

    Args:
        starts: int32 `[B, H, K + 1]`, where each cluster begins.

    Returns:
        first position of each block and the end, int32 `[B, H, N + 1]`; and the cluster each block is of, int64
        `[B, H, N]`, K for those without tokens and K + 1 for the text's.
    """
    video, clusters = layout.n_video_tokens, starts.shape[2] - 1
    sizes = starts.diff(dim=-1).long()
    ends = ((sizes + layout.block - 1) // layout.block).cumsum(-1)  # blocks up to each cluster's end
    most = clusters + video // layout.block  # each cluster may leave one block short
    place = torch.arange(most, device=starts.device).expand(*ends.shape[:2], -1).contiguous()
    owner = torch.searchsorted(ends, place, right=True)
    last = owner.clamp_max(clusters - 1)
    left = (ends.gather(2, last) - place) * layout.block  # to the end of its cluster, the last block taken as full
    whole = (sizes + layout.block - 1) // layout.block * layout.block
    first = starts.gather(2, last) + whole.gather(2, last) - left
    first = first.masked_fill(owner == clusters, video)
    text = torch.arange(video, layout.n_tokens, layout.block, device=starts.device)
    behind = torch.cat([text, text.new_tensor([layout.n_tokens])]).expand(*ends.shape[:2], -1)
    owner = torch.cat([owner, torch.full_like(behind[..., 1:], clusters + 1)], dim=-1)
    return torch.cat([first, behind], dim=-1).int(), owner


def cluster_forced(clusters: int, layout: TokenLayout) -> Tensor:
    """What is read whatever its share, bool `[K + 2, N]`: rows for clusters, for no token and for text.

    Everything reads the text, and text reads everything. The layout remembers it.
    """
    key = ("clusters", "forced", clusters)
    if key not in layout.memo:
        video, text = count_runs(layout)
        forced = torch.zeros(clusters + 2, video + text, dtype=torch.bool, device=layout.starts.device)
        forced[:, video:] = True
        forced[clusters + 1] = True
        layout.memo[key] = forced
    return layout.memo[key]


def plan_of_runs(
    counts: Tensor,
    indices: Tensor,
    layout: TokenLayout,
    q_order: Tensor,
    k_order: Tensor,
    q_starts: Tensor | None = None,
) -> BlockPlan:
    """The plan whose blocks are the runs of these orders.

    Args:
        counts: int32 `[B|1, H|1, N]`.
        indices: int32 `[B|1, H|1, N, M]`, read up to `counts`.
        q_order: int32 `[B|1, H|1, S]`, which token stands at each position; as is `k_order`.
        q_starts: int32 `[B|1, H|1, N + 1]`, where blocks of queries begin, if they are other than the runs.
    """
    starts = run_starts(layout).to(counts.device)
    longest = min(layout.block, max(layout.n_video_tokens, layout.text))
    # without text only the last run is short; with it also the video's last, if the block does not divide it
    even = not layout.text or layout.n_video_tokens % longest == 0
    return BlockPlan(
        counts=counts,
        indices=indices,
        q_starts=starts if q_starts is None else q_starts,
        k_starts=starts,
        n_q_tokens=layout.n_tokens,
        n_k_tokens=layout.n_tokens,
        max_q_block=longest,
        max_k_block=longest,
        even_k=even,
        even_q=even and q_starts is None,
        q_order=q_order,
        k_order=k_order,
    )
