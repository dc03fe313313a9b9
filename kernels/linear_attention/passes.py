"""Linear attention and its gradient, as steps over some heads at a time. The steps are an implementation's.

The states of unread key blocks are added by one product with the 0/1 matrix of what is not read. Taking the read ones
from the total instead would cancel: with most of a block's weight in what is read, little of the digits is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dit_accel.errors import UsageError


@dataclass(frozen=True)
class Blocks:
    """Which states each row reads."""

    unread: Tensor | None  # bool [B|1, H|1, Nq, Nk], which key blocks' states a query block reads; None: all
    q_starts: Tensor  # int32 [B|1, H|1, Nq + 1]
    k_starts: Tensor  # int32 [B|1, H|1, Nk + 1]
    max_q_block: int
    max_k_block: int

    @property
    def n_q(self) -> int:
        return self.q_starts.shape[2] - 1

    @property
    def n_k(self) -> int:
        return self.k_starts.shape[2] - 1

    def of(self, rows: slice, heads: slice) -> Blocks:
        """The same for some batch rows and heads."""
        unread = None if self.unread is None else _some(self.unread, rows, heads)
        starts = (_some(x, rows, heads) for x in (self.q_starts, self.k_starts))
        return Blocks(unread, *starts, self.max_q_block, self.max_k_block)

    def gather(self, states: Tensor, sums: Tensor, operands: torch.dtype) -> tuple[Tensor, Tensor]:
        """From key blocks' states to those that query blocks read, `[B, H, Nq, D, D]` and `[B, H, Nq, D]`."""
        return self._mix(states, sums, self.n_q, self.unread, operands)

    def scatter(self, states: Tensor, sums: Tensor, operands: torch.dtype) -> tuple[Tensor, Tensor]:
        """The transpose of `gather`: from query blocks to key blocks."""
        return self._mix(states, sums, self.n_k, None if self.unread is None else self.unread.mT, operands)

    def _mix(
        self, states: Tensor, sums: Tensor, blocks: int, matrix: Tensor | None, operands: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if matrix is None:  # one sum for everyone
            total, sums = states.sum(2, keepdim=True).to(operands), sums.sum(2, keepdim=True)
            return total.expand(-1, -1, blocks, -1, -1), sums.expand(-1, -1, blocks, -1)
        mixed = matrix.to(states.dtype) @ states.flatten(3)
        return mixed.unflatten(3, states.shape[3:]), matrix.to(sums.dtype) @ sums


def operands_for(dtype: torch.dtype) -> torch.dtype:
    """What products multiply for inputs of a type. float16's range is too small for sums over all tokens."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.bfloat16


def attend(
    steps: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    feature: str,
    eps: float,
    workspace: int,
    weight: Tensor | None,
    bias: Tensor | None,
    into: Tensor | None,
) -> Tensor:
    """The output, in `into` (added to what it has) or a new tensor.

    Args:
        q, k, v: `[B, H, S, D]`.
        weight: `[H|1, D, D]` or None; bias: `[H|1, D]` or None.
    """
    operands = operands_for(q.dtype)
    out = torch.empty_like(q) if into is None else into
    fold = weight is not None and _fold(blocks, q.shape[2], q.shape[3], operands)
    if weight is not None:
        weight = weight.to(operands).contiguous()
    for rows, heads in _chunks(q, blocks, workspace, backward=False):
        own, some = blocks.of(rows, heads), (rows, heads)
        own_weight, own_bias = (
            None if x is None else x[heads if len(x) > 1 else slice(None)] for x in (weight, bias)
        )
        states, sums = _states(steps, k[some], v[some], own, feature, operands)
        if fold:
            states, own_weight = _project(states, own_weight), None
        steps.read_states(
            *(q[some], states, sums, own.q_starts, own.max_q_block, feature, eps, operands),
            *(own_weight, own_bias, out[some], into is not None),
        )
        del states  # before the next heads' are made
    return out


def gradients(
    steps: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    blocks: Blocks,
    feature: str,
    eps: float,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the output. States are made anew: keeping them would cost more."""
    operands = operands_for(q.dtype)
    found = tuple(torch.empty_like(x) for x in (q, k, v))
    for rows, heads in _chunks(q, blocks, workspace, backward=True):
        own, some = blocks.of(rows, heads), (rows, heads)
        states, sums = _states(steps, k[some], v[some], own, feature, operands)
        d_q, d_k, d_v = (x[some] for x in found)
        d_states, d_sums = steps.read_states_backward(
            *(q[some], grad[some], states, sums, own.q_starts, own.max_q_block, feature, eps, operands),
            *(_stored(own, operands), d_q),
        )
        del states
        d_states, d_sums = own.scatter(d_states, d_sums, operands)
        steps.block_states_backward(
            *(k[some], v[some], d_states, d_sums, own.k_starts, own.max_k_block, feature, operands, d_k, d_v)
        )
        del d_states
    return found


def _states(
    steps: ModuleType, k: Tensor, v: Tensor, blocks: Blocks, feature: str, operands: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What each query block reads. The key blocks' own states are let go."""
    stored = _stored(blocks, operands)
    states, sums = steps.block_states(k, v, blocks.k_starts, blocks.max_k_block, feature, operands, stored)
    return blocks.gather(states, sums, operands)


def _stored(blocks: Blocks, operands: torch.dtype) -> torch.dtype:
    """Parts of one sum over everything are few, and kept whole."""
    return torch.float32 if blocks.unread is None and operands == torch.bfloat16 else operands


def _fold(blocks: Blocks, tokens: int, dim: int, operands: torch.dtype) -> bool:
    """Whether a weight is cheaper on states than on rows: D rows of every state against all rows of its block.

    Where both cost the same, rows win: they are in registers, and the states would be read and written once more. But a
    float32 state and a weight beside it do not fit into the shared memory of every chip.
    """
    if operands == torch.float32:
        return True
    states = 1 if blocks.unread is None else blocks.n_q
    return states * dim < tokens


def _project(states: Tensor, weight: Tensor) -> Tensor:
    """`H W^T` for every state; those that are one in memory stay one."""
    blocks = states.shape[2]
    if states.stride(2) == 0:
        states = states[:, :, :1]
    return (states @ weight.mT[:, None]).expand(-1, -1, blocks, -1, -1)


def _some(x: Tensor, rows: slice, heads: slice) -> Tensor:
    everyone = slice(None)
    return x[rows if x.shape[0] > 1 else everyone, heads if x.shape[1] > 1 else everyone]


def _chunks(q: Tensor, blocks: Blocks, workspace: int, backward: bool) -> Iterator[tuple[slice, slice]]:
    """Batch rows and heads whose states fit into `workspace` bytes."""
    batch, heads, _, dim = q.shape
    size = _bytes_per_head(blocks, dim, q.dtype, backward)
    fit = workspace // size
    if fit < 1:
        raise UsageError(
            f"workspace={workspace} bytes do not hold the states of one head: {blocks.n_q} query and {blocks.n_k} key "
            f"blocks of head size {dim} need {size}. Allow that many, or use longer blocks."
        )
    step = max(1, fit // heads)
    for row in range(0, batch, step):
        for head in range(0, heads, min(heads, fit)):
            yield slice(row, row + step), slice(head, head + min(heads, fit))


def _bytes_per_head(blocks: Blocks, dim: int, dtype: torch.dtype, backward: bool) -> int:
    operands = operands_for(dtype)
    wide = max(4, operands.itemsize)
    stored = _stored(blocks, operands).itemsize
    n_q, n_k = blocks.n_q, blocks.n_k
    if blocks.unread is None:
        return (max(n_q, n_k) if backward else n_k) * dim * (dim + 1) * stored + 3 * dim * (dim + 1) * wide
    states = max(n_q + n_k, 2 * n_q) if backward else n_q + n_k
    matrix = n_q * n_k * (operands.itemsize + wide)
    # A folded weight makes the query blocks' states once more.
    return max(states, 2 * n_q) * dim * dim * stored + 2 * (n_q + n_k) * dim * wide + matrix
