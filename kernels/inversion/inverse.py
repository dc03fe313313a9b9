"""Inverse: a plan read by columns, and its columns cut into work items of bounded length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SHORTEST = 8  # entries: what a chunk saves must be worth the sums that it adds
SPREAD = 16  # mean columns: about as long is the longest chunk, where key blocks are many
LEAST_CHUNKS = 16  # that a head is cut into, were it one column; where key blocks are few
FIELDS = 4  # of an item


@dataclass(frozen=True, eq=False)
class Inverse:
    """Which query blocks read each key block, as a plan says which key blocks each query block reads.

    An item is the work of one program: (key block, first entry of its list, entries, chunks of the list). A column is
    cut into even chunks, of at most `max(SHORTEST, total / chunks)` entries (`most_chunks`): one that every query block
    reads (a sink) would otherwise keep its program busy long after all others are done. The items of cut columns come
    first, those of a column one after the other, and item i of these has slot i of a workspace; then every other
    column, empty ones too, as one item each; then items of key block -1, which are no work.
    """

    counts: Tensor  # int32 [B|1, H|1, Nk]: query blocks that read each key block
    lists: Tensor  # int32 [B|1, H|1, Nk, Nq]: their numbers, ascending, valid up to counts
    items: Tensor  # int32 [B|1, H|1, W, 4]
    slots: int  # an upper bound of the items of cut columns, known without reading the plan


def most_chunks(n_k: int) -> int:
    """The number that a head's entries are divided by for the longest chunk."""
    return max(LEAST_CHUNKS, -(-n_k // SPREAD))


def bounds(n_q: int, n_k: int) -> tuple[int, int]:
    """Upper bounds of a head's items and of those among them that are chunks of cut columns.

    With c_j entries in column j, T in all, and chunks of up to L = max(SHORTEST, ceil(T / m)): the cut columns have
    sum c_j <= T <= m L and each more than L, so they are fewer than m, and sum ceil(c_j / L) is less than 2 m.
    """
    chunks, longest = most_chunks(n_k), -(-n_q // SHORTEST)
    items = n_k + min(chunks - 1, n_k * (longest - 1))
    slots = min(2 * chunks - 1, items) if longest > 1 else 0
    return items, slots
