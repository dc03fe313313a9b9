"""Other packages' block-sparse attention, for side-by-side timing; each is left out where it is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan


@dataclass(frozen=True)
class Peer:
    """Another package's kernel."""

    make: Callable[[Tensor, Tensor, Tensor, BlockPlan], Callable[[], Tensor]]
    block: int | None  # tokens of every block; None: it is dense
    error: float = 0.01  # relative, against Triton's result, up to which it is timed


def peer_candidates(
    names: Iterable[str], q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and call of every peer among `names` that is installed and takes the plan.

    q, k, v and what they give: `[B, S, H, D]`.
    """
    for name in names:
        if not _takes(PEERS[name], plan):
            continue
        try:
            run = PEERS[name].make(q, k, v, plan)
            run()
        except Exception as error:  # a peer's failure is a line of the report
            print(
                f"{name} not timed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        yield name, run


def _takes(peer: Peer, plan: BlockPlan) -> bool:
    """Whether the plan has blocks of the peer's one size, or reads everything."""
    if peer.block is None:
        return bool((plan.counts == plan.n_k).all())
    starts = torch.arange(0, plan.n_k_tokens, peer.block, device=plan.device)
    return all(
        side.shape[2] == len(starts) + 1 and torch.equal(side[0, 0, :-1].long(), starts)
        for side in (plan.q_starts, plan.k_starts)
    )


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    tensors = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(plan.counts),
        mask_block_idx=torch.zeros_like(plan.indices),
        full_block_cnt=plan.counts,
        full_block_idx=plan.indices,
        block_size=(128, 128),
    )
    return lambda: _flash_attn_fwd(q, k, v, block_sparse_tensors=tensors, return_lse=True)[0]


def _flex(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    none = torch.zeros_like(plan.counts), torch.zeros_like(plan.indices)
    mask = BlockMask.from_kv_blocks(*none, plan.counts, plan.indices, BLOCK_SIZE=(128, 128))
    attend = torch.compile(flex_attention, dynamic=False)
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: attend(*by_head, block_mask=mask, return_lse=True)[0].transpose(1, 2)


def _fastvideo(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices

    if plan.n_q_tokens % 64 or plan.n_k_tokens % 64:
        raise ValueError("it takes whole blocks of 64 tokens")
    by_head = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    sizes = plan.k_starts[0, 0].diff().int()
    lists = plan.indices.contiguous(), plan.counts.contiguous()
    return lambda: block_sparse_attn_from_indices(*by_head, *lists, sizes)[0].transpose(1, 2)


def _sageattention(q: Tensor, k: Tensor, v: Tensor, _plan: BlockPlan) -> Callable[[], Tensor]:
    from sageattention import sageattn

    return lambda: sageattn(q, k, v, tensor_layout="NHD")


PEERS = {
    "flash-attn-4": Peer(_flash_attn_4, 128),
    "flex": Peer(_flex, 128),
    "fastvideo": Peer(_fastvideo, 64),
    "sageattention": Peer(_sageattention, None, error=0.06),  # quantised
}
