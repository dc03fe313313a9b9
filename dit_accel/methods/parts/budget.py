"""Budget: how many of the scored blocks each query block reads, and which."""

from __future__ import annotations

from torch import Tensor

from dit_accel.arrangement import blocks_for
from dit_accel.kernels.selection import select_blocks


def choose_blocks(
    scores: Tensor,
    forced: Tensor | None,
    keep: float | None,
    top_p: float | None = None,
    shares: Tensor | None = None,
    *,
    above: float | None = None,
    text_blocks: int = 0,
) -> tuple[Tensor, Tensor]:
    """Choose key blocks by score: the forced ones, then the best until both budgets are met.

    A block of higher score comes first, of equal score the lower index. The same scores always give the same
    choice.

    Args:
        scores: fp32 `[B, H, Nq, Nk]`, how much a token of each key block matters. Per token, not per block: a
            larger block matters more in proportion but costs as much more, so ranking by the whole would read
            more tokens than the share of blocks says.
        forced: bool `[Nq, Nk]` or None.
        keep: share of the video's key blocks to read, forced ones included.
        top_p: read the first blocks that together reach this much of `shares`.
        shares: fp32 like scores, the attention each key block is expected to take; `top_p` needs it.
        above: also read every block of at least this score.
        text_blocks: how many of the key blocks hold text; they are read beside the budget.

    Returns:
        counts int32 `[B, H, Nq]` and indices int32 `[B, H, Nq, M]`, ascending up to the count; what stands
        behind the count repeats the last block and is not read.
    """
    least = 1 if keep is None else blocks_for(keep, scores.shape[-1] - text_blocks) + text_blocks
    return select_blocks(scores, forced, least, top_p, shares, above=above)
