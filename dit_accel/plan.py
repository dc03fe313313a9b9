"""BlockPlan: which key blocks each query block reads.

A plan is the only thing a sparse method and a kernel say to each other. Blocks are given by token offsets, so that
text never shares a block with video, space-time tiles may differ in size and a block may even be empty; the uniform
grid is the special case `uniform_starts`. Lists ascend (executors walk them last to first and only the last list
entry can be the ragged tail).

Everything a launch needs to know on the host (numbers of blocks and tokens, the largest block) is stored as a Python
int beside the tensors: reading it never waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .errors import UsageError

Starts = Tensor | Sequence[int]


def uniform_starts(n_tokens: int, block: int, device: torch.device | str | None = None) -> Tensor:
    """Token offsets of equal blocks: `[0, block, 2*block, ..., n_tokens]`, the last block ragged.

    Args:
        n_tokens: tokens in the sequence, at least 1.
        block: tokens per block, at least 1.
        device: where the offsets are to live.

    Returns:
        int32 `[1, 1, ceil(n_tokens / block) + 1]`.
    """
    if n_tokens < 1 or block < 1:
        raise UsageError(f"uniform_starts needs n_tokens >= 1 and block >= 1, got {n_tokens} and {block}.")
    count = -(-n_tokens // block)
    return (torch.arange(count + 1, device=device, dtype=torch.int32) * block).clamp_(max=n_tokens)[
        None, None
    ]


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Which key blocks each query block reads, per batch row and head.

    A leading dimension of 1 stands for every batch row or head. Block `i` holds the tokens
    `[starts[i], starts[i + 1])`; a zero-length block is allowed. A query block whose count is 0 has an empty row:
    its output is 0 and its lse is -inf.

    Values on the CPU are checked on creation. On an accelerator that would cost a synchronisation, and torch.compile
    cannot trace it, so only shapes, types and devices are checked there; `check_values()` does the rest on request.

    Raises:
        UsageError: a shape, type, device or (on the CPU) value that is not as described.
    """

    counts: Tensor  # int32 [B|1, H|1, Nq]: kept key blocks of each query block
    indices: Tensor  # int32 [B|1, H|1, Nq, M]: their numbers, ascending, valid up to counts
    q_starts: Tensor  # int32 [B|1, H|1, Nq+1]: token offsets of the query blocks
    k_starts: Tensor  # int32 [B|1, H|1, Nk+1]: token offsets of the key blocks
    n_q_tokens: int  # tokens the query blocks cover
    n_k_tokens: int  # tokens the key blocks cover
    max_q_block: int  # no query block is longer
    max_k_block: int  # no key block is longer
    even_k: bool = False  # known that every key block but the last holds exactly max_k_block tokens
    even_q: bool = False  # the same of the query blocks and max_q_block
    key_means: Tensor | None = (
        None  # fp32 [B, H, Nk, D], mean key of each block, if the plan was made from them
    )
    # fp32 [B, H, Nq, Nk], which key blocks' means stand in for them (`kernels.coarse`); -inf: not this one. The
    # logarithm of how many tokens a mean stands for or, with `rest`, of the attention mass it is taken to have
    coarse: Tensor | None = None
    rest: Tensor | None = None  # fp32 [B, H, Nq], logarithm of the mass that all else is taken to have
    # bool [B|1, H|1, Nq, Nk], key blocks not read that matter so little that nothing shall stand in for them
    # (`kernels.linear_attention`); None: there are none
    skipped: Tensor | None = None
    # int32 [B|1, H|1, S], which token stands at each position that the offsets count; None: as they come
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    longest_first: bool = False  # the query blocks that read most (text) are the first, not the last: begin with them

    def __post_init__(self) -> None:
        fields = {name: getattr(self, name) for name in ("counts", "indices", "q_starts", "k_starts")}
        for name, tensor in fields.items():
            rank = 4 if name == "indices" else 3
            if tensor.dim() != rank:
                raise UsageError(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}.")
            if tensor.dtype != torch.int32:
                raise UsageError(f"{name} must be int32, got {tensor.dtype}; call `.to(torch.int32)`.")
            if tensor.device != self.counts.device:
                raise UsageError(f"{name} is on {tensor.device}, counts on {self.counts.device}; move one.")
        for axis, what in enumerate(("batch", "head")):
            sizes = {tensor.shape[axis] for tensor in fields.values()} - {1}
            if len(sizes) > 1:
                raise UsageError(f"The plan's {what} sizes must be 1 or one number, got {sorted(sizes)}.")
        if self.indices.shape[:3] != self.counts.shape:
            raise UsageError(
                f"indices {tuple(self.indices.shape)} must be counts {tuple(self.counts.shape)} plus one "
                "dimension of list entries."
            )
        if self.q_starts.shape[2] != self.n_q + 1 or self.n_q < 1:
            raise UsageError(
                f"q_starts must hold one offset more than the {self.n_q} query blocks of counts, got "
                f"{self.q_starts.shape[2]}."
            )
        if self.k_starts.shape[2] < 2:
            raise UsageError(f"k_starts must hold at least 2 offsets, got {self.k_starts.shape[2]}.")
        self._check_extras()
        if self.counts.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_values()

    def _check_extras(self) -> None:
        blocks = (self.n_q, self.n_k)
        if self.rest is not None and (self.coarse is None or self.rest.shape != self.coarse.shape[:3]):
            raise UsageError(
                f"rest comes with coarse, a number for each of its rows; got {tuple(self.rest.shape)}."
            )
        if self.coarse is not None and (self.coarse.dim() != 4 or self.coarse.shape[2:] != blocks):
            raise UsageError(
                f"coarse must be [B, H, {blocks[0]}, {blocks[1]}], got {tuple(self.coarse.shape)}."
            )
        if self.skipped is not None and (self.skipped.dtype != torch.bool or self.skipped.shape[2:] != blocks):
            raise UsageError(
                f"skipped must be bool [B|1, H|1, {blocks[0]}, {blocks[1]}], got {self.skipped.dtype} "
                f"{tuple(self.skipped.shape)}."
            )
        for name, tokens in (("q_order", self.n_q_tokens), ("k_order", self.n_k_tokens)):
            order = getattr(self, name)
            if order is not None and (
                order.dim() != 3 or order.shape[2] != tokens or order.dtype != torch.int32
            ):
                raise UsageError(
                    f"{name} must be int32 [B|1, H|1, {tokens}], got {order.dtype} {tuple(order.shape)}."
                )

    @property
    def n_q(self) -> int:
        """Number of query blocks."""
        return self.counts.shape[2]

    @property
    def n_k(self) -> int:
        """Number of key blocks."""
        return self.k_starts.shape[2] - 1

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @property
    def lead(self) -> tuple[int, int]:
        """Batch rows and heads the plan tells apart, `(B | 1, H | 1)`."""
        tensors = [self.counts, self.q_starts, self.k_starts]
        tensors += [x for x in (self.coarse, self.skipped, self.q_order, self.k_order) if x is not None]
        return max(t.shape[0] for t in tensors), max(t.shape[1] for t in tensors)

    @property
    def n_pairs(self) -> int:
        """Pairs of a query token and a key token, over the batch rows and heads the plan tells apart."""
        batch, heads = self.lead
        return batch * heads * self.n_q_tokens * self.n_k_tokens

    def check_values(self) -> None:
        """Check what only the numbers can tell: offsets, list lengths, ascending lists. Waits for the device.

        Raises:
            UsageError: the first rule that is broken.
        """
        for side, starts, tokens, longest in (
            ("q", self.q_starts, self.n_q_tokens, self.max_q_block),
            ("k", self.k_starts, self.n_k_tokens, self.max_k_block),
        ):
            sizes = starts.diff(dim=-1)
            low, high = (int(x) for x in sizes.aminmax())
            ends = starts[..., [0, -1]].reshape(-1, 2)
            if low < 0 or bool((ends != ends.new_tensor([0, tokens])).any()):
                raise UsageError(
                    f"{side}_starts must rise from 0 to n_{side}_tokens={tokens} and never fall."
                )
            if getattr(self, f"even_{side}") and bool((sizes[..., :-1] != longest).any()):
                what = "key" if side == "k" else "query"
                raise UsageError(
                    f"even_{side} says that all {what} blocks but the last hold {longest} tokens; one does not."
                )
            if high > longest:
                raise UsageError(f"A {side} block holds {high} tokens, more than max_{side}_block={longest}.")
        low, high = (int(x) for x in self.counts.aminmax())
        if low < 0 or high > self.indices.shape[3]:
            raise UsageError(
                f"counts must lie in 0..{self.indices.shape[3]} (the list width), got {low}..{high}."
            )
        if self.indices.shape[3] == 0:
            return
        slot = torch.arange(self.indices.shape[3], device=self.device)
        valid = slot < self.counts[..., None]
        outside = (self.indices < 0) | (self.indices >= self.n_k)
        if bool((outside & valid).any()):
            raise UsageError(f"indices must lie in 0..{self.n_k - 1} up to counts; some entry does not.")
        if bool(((self.indices.diff(dim=-1) <= 0) & valid[..., 1:]).any()):
            raise UsageError(
                "indices must ascend strictly up to counts; build the plan with BlockPlan.from_mask."
            )

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        q_starts: Starts,
        k_starts: Starts,
        *,
        n_q_tokens: int | None = None,
        n_k_tokens: int | None = None,
        max_q_block: int | None = None,
        max_k_block: int | None = None,
    ) -> BlockPlan:
        """Turn a block mask into ascending lists.

        The four host numbers are read from the offsets when they are not given. Offsets that are a Python sequence
        or a CPU tensor give them for free; for offsets on an accelerator pass them, or the read waits for the
        device. The list width is the number of key blocks, since a tighter one would have to be read back.

        Args:
            mask: bool `[B|1, H|1, Nq, Nk]`, true where the query block reads the key block.
            q_starts: token offsets of the query blocks, int `[B|1, H|1, Nq+1]` or `[Nq+1]`, or a sequence.
            k_starts: the same for the key blocks.
            n_q_tokens: tokens the query blocks cover (the last offset).
            n_k_tokens: tokens the key blocks cover.
            max_q_block: an upper bound of the query blocks' lengths.
            max_k_block: an upper bound of the key blocks' lengths.
        """
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise UsageError(f"mask must be bool [B|1, H|1, Nq, Nk], got {mask.dtype} {tuple(mask.shape)}.")
        even_q, even_k = _are_even(q_starts), _are_even(k_starts)
        q_starts, n_q_tokens, max_q_block = _measure(q_starts, n_q_tokens, max_q_block, mask.device)
        k_starts, n_k_tokens, max_k_block = _measure(k_starts, n_k_tokens, max_k_block, mask.device)
        n_k = mask.shape[3]
        if k_starts.shape[2] != n_k + 1:
            raise UsageError(
                f"k_starts must hold {n_k + 1} offsets for a mask {n_k} wide, got {k_starts.shape[2]}."
            )
        block = torch.arange(n_k, device=mask.device, dtype=torch.int32)
        # Dropped blocks sort behind every kept one; what follows the valid part is harmless, never out of range.
        order = torch.where(mask, block, block + n_k).sort(dim=-1).values
        return cls(
            counts=mask.sum(dim=-1, dtype=torch.int32),
            indices=order % n_k,
            q_starts=q_starts,
            k_starts=k_starts,
            n_q_tokens=n_q_tokens,
            n_k_tokens=n_k_tokens,
            max_q_block=max_q_block,
            max_k_block=max_k_block,
            even_k=even_k == max_k_block,
            even_q=even_q == max_q_block,
        )

    @classmethod
    def full(
        cls,
        q_starts: Starts,
        k_starts: Starts,
        *,
        n_q_tokens: int | None = None,
        n_k_tokens: int | None = None,
        max_q_block: int | None = None,
        max_k_block: int | None = None,
    ) -> BlockPlan:
        """The plan that keeps everything, for every batch row and head. Arguments as in `from_mask`."""
        device = next((s.device for s in (q_starts, k_starts) if isinstance(s, Tensor)), torch.device("cpu"))
        n_q, n_k = (s.shape[-1] - 1 if isinstance(s, Tensor) else len(s) - 1 for s in (q_starts, k_starts))
        return cls.from_mask(
            torch.ones(1, 1, n_q, n_k, dtype=torch.bool, device=device),
            q_starts,
            k_starts,
            n_q_tokens=n_q_tokens,
            n_k_tokens=n_k_tokens,
            max_q_block=max_q_block,
            max_k_block=max_k_block,
        )

    def to_mask(self) -> Tensor:
        """The block mask, bool `[B|1, H|1, Nq, Nk]`."""
        slot = torch.arange(self.indices.shape[3], device=self.device)
        # Entries past the valid part go to a column that is cut off again.
        column = torch.where(slot < self.counts[..., None], self.indices, self.n_k).long()
        mask = torch.zeros(*self.counts.shape, self.n_k + 1, dtype=torch.bool, device=self.device)
        return mask.scatter_(-1, column, True)[..., : self.n_k]

    def to_token_mask(self) -> Tensor:
        """Which key token each query token reads, bool `[B|1, H|1, n_q_tokens, n_k_tokens]`; orders are undone.

        N x N: for oracles and pictures, never for a product path.
        """
        mask = self.to_mask()
        lead = self.lead
        mask = mask.expand(*lead, -1, -1)
        rows = _owner(self.q_starts, self.n_q_tokens).expand(*lead, -1)
        columns = _owner(self.k_starts, self.n_k_tokens).expand(*lead, -1)
        mask = mask.gather(2, rows[..., None].expand(-1, -1, -1, mask.shape[3]))
        mask = mask.gather(3, columns[..., None, :].expand(-1, -1, mask.shape[2], -1))
        for axis, order in ((2, self.q_order), (3, self.k_order)):
            if order is not None:  # from positions to tokens
                lead = torch.broadcast_shapes(order.shape[:2], mask.shape[:2])
                place = order.long().argsort(-1).unsqueeze(5 - axis).expand(*lead, *mask.shape[2:])
                mask = mask.expand(*lead, -1, -1).gather(axis, place)
        return mask

    def coarsen(self, q_factor: int = 1, k_factor: int = 1) -> BlockPlan:
        """Merge runs of neighbouring blocks; a merged pair is kept if any of its parts was (OR, never AND).

        So the coarse plan reads everything the fine one did, and possibly more.

        Args:
            q_factor: query blocks per merged one, at least 1; the last may be made of fewer.
            k_factor: the same for key blocks.
        """
        if q_factor < 1 or k_factor < 1:
            raise UsageError(f"coarsen needs factors >= 1, got q_factor={q_factor}, k_factor={k_factor}.")
        mask = self.to_mask()
        mask = torch.nn.functional.pad(mask, (0, -self.n_k % k_factor, 0, -self.n_q % q_factor))
        mask = mask.unflatten(3, (-1, k_factor)).any(4).unflatten(2, (-1, q_factor)).any(3)
        return BlockPlan.from_mask(
            mask,
            _every(self.q_starts, q_factor),
            _every(self.k_starts, k_factor),
            n_q_tokens=self.n_q_tokens,
            n_k_tokens=self.n_k_tokens,
            max_q_block=min(self.max_q_block * q_factor, self.n_q_tokens),
            max_k_block=min(self.max_k_block * k_factor, self.n_k_tokens),
        )


def lead_strides(tensor: Tensor) -> tuple[int, int]:
    """Batch and head strides of a plan's tensor for a kernel: 0 where one entry stands for all."""
    return tuple(0 if tensor.shape[axis] == 1 else tensor.stride(axis) for axis in (0, 1))


def _measure(
    starts: Starts, n_tokens: int | None, longest: int | None, device: torch.device
) -> tuple[Tensor, int, int]:
    """Offsets as int32 `[., ., N+1]` on `device`, with their end and their longest block as host numbers."""
    host = starts if isinstance(starts, Tensor) else torch.tensor(list(starts), dtype=torch.int32)
    if host.dim() == 1:
        host = host[None, None]
    if host.dim() != 3 or host.shape[-1] < 2 or host.is_floating_point():
        raise UsageError(
            f"Offsets must be integers [B|1, H|1, N+1] or [N+1] with N >= 1, got {tuple(host.shape)}."
        )
    if n_tokens is None:
        n_tokens = int(host[0, 0, -1])
    if longest is None:
        longest = int(host.diff(dim=-1).max())
    return host.to(device=device, dtype=torch.int32), n_tokens, longest


def _are_even(starts: Starts) -> int | None:
    """The length of all blocks but the last, which is no longer; None if they differ or only a device knows."""
    if isinstance(starts, Tensor):
        if starts.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        starts = starts.reshape(-1, starts.shape[-1])
        if bool((starts != starts[:1]).any()):
            return None
        starts = starts[0].tolist()
    sizes = [b - a for a, b in pairwise(starts)]
    return sizes[0] if all(n == sizes[0] for n in sizes[:-1]) and 0 < sizes[-1] <= sizes[0] else None


def _owner(starts: Tensor, n_tokens: int) -> Tensor:
    """The block each token belongs to, int64 `[., ., n_tokens]`."""
    token = torch.arange(n_tokens, device=starts.device, dtype=starts.dtype).expand(
        *starts.shape[:2], n_tokens
    )
    return torch.searchsorted(starts.contiguous(), token.contiguous(), right=True) - 1


def _every(starts: Tensor, factor: int) -> Tensor:
    """Each `factor`-th offset, and the end."""
    inner = starts[..., :-1]
    return torch.cat([inner[..., ::factor], starts[..., -1:]], dim=-1)
