"""flash-attn-4's block-sparse forward as an executor: written in CuTe for sm_90 and sm_100, an optional package.

It takes a list of blocks without a mask for each query block, visits it from the last to the first, and masks the tail
of the sequence in the last list entry only: lists must ascend, as a plan's do. Query blocks with empty lists give 0
and -inf there too.
"""

from __future__ import annotations

import functools
from importlib import metadata

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan

from .even_blocks import SIZE, why_uneven

DTYPES = (torch.float16, torch.bfloat16)
HEADS = (64, 128)
CHIPS = (9, 10)  # major compute capabilities


def why_not(q: Tensor, plan: BlockPlan) -> str | None:
    """Why flash-attn-4 cannot run this call, or None. q: `[B, H, S, D]`."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}; it runs on CUDA devices."
    if torch.cuda.get_device_capability(q.device)[0] not in CHIPS:
        return (
            f"{torch.cuda.get_device_name(q.device)} is neither a Hopper nor a Blackwell GPU (sm_90, sm_100)."
        )
    if q.dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {q.dtype}."
    if q.shape[3] not in HEADS:
        return f"head size {q.shape[3]} is not one of {', '.join(map(str, HEADS))}."
    return _why_not_installed() or why_uneven(plan)


@functools.cache  # looking through the installed packages takes longer than a call
def _why_not_installed() -> str | None:
    try:
        metadata.version("flash-attn-4")
        import flash_attn.cute.interface  # noqa: F401
    except (ImportError, metadata.PackageNotFoundError) as error:
        return f"flash-attn-4 cannot be imported ({error}); install it with `pip install flash-attn-4`."
    return None


def block_sparse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Run it on the current stream. Arguments and results as in `reference.block_sparse`."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    lead = q.shape[:2]
    counts, indices = plan.counts.expand(*lead, -1), plan.indices.expand(*lead, -1, -1)
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices[..., :1]),
        full_block_cnt=counts.contiguous(),
        full_block_idx=indices.contiguous(),
        block_size=(SIZE, SIZE),
    )
    by_token = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _flash_attn_fwd(
        *by_token, softmax_scale=scale, block_sparse_tensors=blocks, return_lse=True
    )
    return out.transpose(1, 2), lse
