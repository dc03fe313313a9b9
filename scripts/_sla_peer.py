"""The SLA authors' layer (`sparse_linear_attention`, Triton), for timing beside ours; it is no part of this project."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import block_sparse
from dit_accel.kernels.linear_attention import linear_attention
from dit_accel.plan import BlockPlan

BLOCKS = 128, 64  # of queries and keys; its kernels take no longer blocks of keys
ERROR = 0.02  # relative, against ours with its own choice of blocks, up to which it is timed


def authors_layer(
    q: Tensor, k: Tensor, v: Tensor, keep: float, weight: Tensor, bias: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Their layer over all keys, choosing of blocks included, with this projection; checked against ours.

    Args:
        q, k, v: `[B, H, S, D]`; it copies them to be contiguous, as is its way.

    Raises:
        ImportError: it is not installed.
        ValueError: its output is not ours.
    """
    from sparse_linear_attention import SparseLinearAttention
    from sparse_linear_attention.utils import get_block_map

    theirs = SparseLinearAttention(q.shape[3], keep, BLKQ=BLOCKS[0], BLKK=BLOCKS[1]).to(q.device)
    with torch.no_grad():
        theirs.proj_l.weight.copy_(weight)
        theirs.proj_l.bias.copy_(bias)
        chosen = get_block_map(
            q.contiguous(), k.contiguous(), topk_ratio=keep, BLKQ=BLOCKS[0], BLKK=BLOCKS[1]
        )[0]
        starts = [[*range(0, q.shape[2], block), q.shape[2]] for block in BLOCKS]
        plan = BlockPlan.from_mask(chosen.bool(), *starts)
        out, _ = block_sparse(q, k, v, plan, layout="bhsd")
        ours = linear_attention(q, k, v, projection=(weight, bias), into=out).float()
        error = float((theirs(q, k, v).float() - ours).norm() / ours.norm())
    if not error <= ERROR:
        raise ValueError(f"its output is {error:.2g} from ours; up to {ERROR:g} is told to rounding")
    return theirs
