"""Other packages' block-sparse attention, for side-by-side timing; each is left out where it is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan

BLOCK = 128


def peer_candidates(
    names: Iterable[str], q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and call of every peer among `names` that is installed and takes the plan.

    q, k, v and what they give: `[B, S, H, D]`.
    """
    starts = torch.arange(0, plan.n_k_tokens, BLOCK, device=q.device)
    for side in (plan.q_starts, plan.k_starts):
        if side.shape[2] != len(starts) + 1 or not torch.equal(side[0, 0, :-1].long(), starts):
            return  # their blocks are all of one size
    for name in names:
        try:
            run = PEERS[name](q, k, v, plan)
            run()
        except Exception as error:  # a peer's failure is a line of the report
            print(
                f"{name} not timed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        yield name, run


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    tensors = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(plan.counts),
        mask_block_idx=torch.zeros_like(plan.indices),
        full_block_cnt=plan.counts,
        full_block_idx=plan.indices,
        block_size=(BLOCK, BLOCK),
    )
    return lambda: _flash_attn_fwd(q, k, v, block_sparse_tensors=tensors, return_lse=True)[0]


def _flex(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    none = torch.zeros_like(plan.counts), torch.zeros_like(plan.indices)
    mask = BlockMask.from_kv_blocks(*none, plan.counts, plan.indices, BLOCK_SIZE=(BLOCK, BLOCK))
    attend = torch.compile(flex_attention, dynamic=False)
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: attend(*by_head, block_mask=mask, return_lse=True)[0].transpose(1, 2)


PEERS = {"flash-attn-4": _flash_attn_4, "flex": _flex}
