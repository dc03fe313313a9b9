"""Recall: how much of the true attention a plan covers, measured exactly on a few query tokens.

The one number that judges a choice of blocks by itself, before layers and steps blur it: a plan drawn by lot covers
about as much as it keeps, a plan that knew the attention would cover nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.plan import BlockPlan

if TYPE_CHECKING:
    from dit_accel.layout import TokenLayout
    from dit_accel.trajectory import Call

# Most probabilities held at once, 256 MiB in fp32: few rows of a long video and many of a short one both fit.
_PIECE = 2**26


@dataclass(frozen=True)
class Seen:
    """What one sparse call read, head by head; figures are means over the batch."""

    role: str
    branch: str | None
    step: int
    layer: int
    noise: float
    keep: tuple[float, ...]  # key tokens read / present, mean over query tokens; one a head
    recall: tuple[float, ...] | None  # true attention covered / all, mean over the sampled query tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, four digits behind the point."""
        told = {**asdict(self), "noise": round(self.noise, 4), "keep": _rounded(self.keep)}
        return {**told, "recall": None if self.recall is None else _rounded(self.recall)}


@dataclass
class Recorder:
    """An observer for `Handle.observe` that notes keep and recall of every sparse call.

    It waits for the device in each call it measures: never watch a run that is being timed.

    Args:
        rows: query tokens sampled in a call; 0 measures no recall.
        wanted: calls whose recall is measured; None: all. The keep of the others is noted all the same.
    """

    rows: int = 64
    wanted: Callable[[Call], bool] | None = None
    seen: list[Seen] = field(default_factory=list)

    def __call__(
        self, call: Call, layout: TokenLayout, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan
    ) -> None:
        heads = query.shape[2]
        recall = None
        if self.rows and (self.wanted is None or self.wanted(call)):
            # text queries read everything: they would only flatter
            rows = layout.video_tokens.start + sample_rows(layout.n_video_tokens, self.rows, query.device)
            recall = tuple(attention_recall(query, key, plan, rows).mean((0, 2)).tolist())
        keep = keep_by_head(plan).mean(0).expand(heads)
        self.seen.append(
            Seen(
                role=call.role,
                branch=call.branch,
                step=call.step,
                layer=call.layer,
                noise=call.noise,
                keep=tuple(keep.tolist()),
                recall=recall,
            )
        )


def sample_rows(n_tokens: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Query tokens to measure on: the same ones for the same numbers, int64 `[min(count, n_tokens)]`, ascending.

    Drawn by lot: at even distances they would always be the same few tokens of each block.
    """
    if n_tokens < 1 or count < 1:
        raise UsageError(f"sample_rows needs n_tokens >= 1 and count >= 1, got {n_tokens} and {count}.")
    drawn = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))[:count]
    return drawn.sort().values.to(device)


def attention_recall(
    query: Tensor, key: Tensor, plan: BlockPlan, rows: Tensor, *, scale: float | None = None
) -> Tensor:
    """Share of their true attention that some query tokens find in the key blocks they read.

    The attention of these rows is computed over all keys, in fp32 also for low-precision input.

    Args:
        query: `[B, S, H, D]`, post-RoPE, in the order the plan was made for.
        key: `[B, S', H, D]`, likewise.
        plan: covers exactly these tokens. Orders of its own (`q_order`, `k_order`) are followed.
        rows: int64 `[R]`, which query tokens.
        scale: factor of the logits; None is `D ** -0.5`.

    Returns:
        fp32 `[B, H, R]`, 0 to 1.

    Raises:
        UsageError: tensors and plan that do not fit one another.
    """
    if query.shape[0::2] != key.shape[0::2] or query.shape[3] != key.shape[3]:
        raise UsageError(
            "query and key must agree in batch, heads and head size, got [B, S, H, D] = "
            f"{tuple(query.shape)} and {tuple(key.shape)}."
        )
    if (plan.n_q_tokens, plan.n_k_tokens) != (query.shape[1], key.shape[1]):
        raise UsageError(
            f"The plan covers {plan.n_q_tokens} query and {plan.n_k_tokens} key tokens, but there are "
            f"{query.shape[1]} and {key.shape[1]}."
        )
    batch, tokens, heads, size = key.shape
    scale = size**-0.5 if scale is None else scale
    read = rows_of_mask(plan, rows).expand(batch, heads, -1, -1)  # [B, H, R, Nk]
    owner = block_of_token(plan, "k").expand(batch, heads, -1)[:, :, None]  # [B, H, 1, S']
    out = torch.empty(batch, heads, rows.numel(), device=query.device)
    step = max(1, _PIECE // (rows.numel() * tokens))
    for b in range(batch):
        for some in (slice(first, first + step) for first in range(0, heads, step)):
            q, k = (x[b, :, some].transpose(0, 1).float() for x in (query[:, rows], key))  # [h, R | S', D]
            shares = (q @ k.transpose(1, 2) * scale).softmax(-1)
            covered = read[b, some].gather(2, owner[b, some].expand(-1, rows.numel(), -1))
            out[b, some] = (shares * covered).sum(-1)
    return out.clamp_(max=1)  # a sum of fp32 shares may end a few ulps above


def keep_by_head(plan: BlockPlan) -> Tensor:
    """Key tokens read / present, mean over query tokens, fp64 `[B|1, H|1]`."""
    q_sizes, k_sizes = (starts.diff(dim=-1).double() for starts in (plan.q_starts, plan.k_starts))
    tokens = (plan.to_mask().double() * k_sizes[:, :, None]).sum(-1)  # [B|1, H|1, Nq]
    return (tokens * q_sizes).sum(-1) / (plan.n_q_tokens * plan.n_k_tokens)


def rows_of_mask(plan: BlockPlan, rows: Tensor) -> Tensor:
    """Which key blocks some query tokens read, bool `[B|1, H|1, R, Nk]`. rows: int64 `[R]`."""
    mask, owner = plan.to_mask(), block_of_token(plan, "q")[..., rows]
    lead = tuple(max(pair) for pair in zip(mask.shape[:2], owner.shape[:2], strict=True))
    owner = owner.expand(*lead, -1)[..., None].expand(-1, -1, -1, mask.shape[3])
    return mask.expand(*lead, -1, -1).gather(2, owner)


def block_of_token(plan: BlockPlan, side: str) -> Tensor:
    """The block that each token belongs to, int64 `[B|1, H|1, S]`. side: "q" or "k"."""
    starts, order = getattr(plan, f"{side}_starts"), getattr(plan, f"{side}_order")
    tokens = getattr(plan, f"n_{side}_tokens")
    position = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
    position = position.expand(*starts.shape[:2], -1).contiguous()
    # An empty block starts where the next one does; the last of equal starts is the one that holds the token.
    owner = torch.searchsorted(starts.contiguous(), position, right=True) - 1
    if order is None:
        return owner
    lead = tuple(max(pair) for pair in zip(owner.shape[:2], order.shape[:2], strict=True))
    owner, order = owner.expand(*lead, -1), order.long().expand(*lead, -1)
    return torch.empty_like(order).scatter_(2, order, owner)


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(value, 4) for value in values]
