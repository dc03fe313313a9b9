"""Block-sparse attention on a CPU of many cores: query blocks in groups, each group one fused call.

Threads that compute alone (`cpu.py`) wait for the interpreter between their small products: measured on an Intel CPU,
sixteen of them took as long as one, four times what dense attention took, and groups a fifth of that. Here one thread
gathers what a group of query blocks reads, of all batch rows and heads, and torch's own fused attention spreads the
group over the cores. Groups are of lists about as long, and shorter ones are filled up with copies of their last token
that a mask takes out again, so that nothing is read that is not kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dit_accel.plan import BlockPlan

A_THREAD = 2, 4  # query blocks of a group for each thread: at least, and at most where that is no more than SMALL
SMALL = 32
BYTES = 1 << 28  # of gathered keys and values at once, at most; a single query block may take more


@dataclass(frozen=True)
class _Block:
    """A query block of one head: where its rows begin and end among those of all heads, and the keys that it reads."""

    first: int
    last: int
    kept: Tensor  # int32 positions among the keys of all heads


def attend_in_groups(
    q: Tensor, k: Tensor, v: Tensor, blocks: list[_Block], scale: float, out: Tensor, lse: Tensor, threads: int
) -> None:
    """Write `out` and `lse`, both contiguous, of these query blocks, and leave other rows alone.

    Args:
        q, k, v: `[B, H, N, D]` in the type that is computed in.
        scale: of the scores.
    """
    head = q.shape[-1]
    rows = q.reshape(-1, head)
    # one gather for both, and one contiguous copy that is cheap to gather from
    pairs = torch.cat([k.reshape(-1, head), v.reshape(-1, head)], 1)
    written = out.view(-1, head), lse.view(-1)
    for group in _groups(blocks, 2 * head * q.element_size(), threads):
        _attend(rows, pairs, group, scale, *written)


def list_blocks(plan: BlockPlan, starts: Tensor, kept: list[Tensor], first_row: int, first_key: int) -> list[_Block]:
    """The query blocks of one head that have rows and read something.

    Args:
        starts: `[Nq + 1]` offsets of its query blocks.
        kept: of each block, positions among the head's own keys.
        first_row, first_key: of this head among those of all.
    """
    offsets = starts.tolist()
    return [
        _Block(first_row + offsets[i], first_row + offsets[i + 1], one + first_key)
        for i, one in enumerate(kept[: plan.n_q])
        if len(one) and offsets[i] < offsets[i + 1]
    ]


def _groups(blocks: list[_Block], key_bytes: int, threads: int) -> list[list[_Block]]:
    """Blocks with lists about as long, the longest first."""
    ordered = sorted(blocks, key=lambda block: -len(block.kept))
    wanted = max(A_THREAD[0] * threads, min(A_THREAD[1] * threads, SMALL))
    groups, at = [], 0
    while at < len(ordered):
        fitting = BYTES // (len(ordered[at].kept) * key_bytes)
        size = max(1, min(wanted, fitting))
        groups.append(ordered[at : at + size])
        at += size
    return groups


def _attend(q: Tensor, pairs: Tensor, group: list[_Block], scale: float, out: Tensor, lse: Tensor) -> None:
    count, head = len(group), q.shape[-1]
    lengths = torch.tensor([len(block.kept) for block in group])
    longest = len(group[0].kept)
    kept = pad_sequence([block.kept for block in group], batch_first=True)  # [G, M]
    places = torch.arange(longest)
    filled = places >= lengths[:, None]
    mask = None
    if len(group[-1].kept) < longest:
        kept = torch.where(filled, kept.gather(1, lengths[:, None] - 1), kept)
        mask = torch.zeros(count, 1, 1, longest, dtype=q.dtype).masked_fill_(filled[:, None, None], -math.inf)
    firsts = torch.tensor([block.first for block in group])[:, None]
    lasts = torch.tensor([block.last for block in group])[:, None]
    numbers = firsts + torch.arange(int((lasts - firsts).max()))
    rows = torch.minimum(numbers, lasts - 1)  # [G, R]
    gathered = pairs.index_select(0, kept.flatten()).view(count, 1, longest, 2 * head)
    own = q[rows][:, None]
    found, found_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        own,
        gathered[..., :head],
        gathered[..., head:],
        0.0,
        False,
        attn_mask=None if mask is None else mask.expand(-1, -1, rows.shape[1], -1),
        scale=scale,
    )
    there = numbers < lasts
    out[numbers[there]] = found[:, 0][there].to(out.dtype)
    lse[numbers[there]] = found_lse.reshape(count, -1)[there]
