"""FlexAttention of torch as an executor: compiled by torch for any CUDA device, and again for some new shapes.

Only compiled: as plain Python it ignores the lists of blocks. So where torch would stop compiling, at its limit of
recompilations, and go on in Python, the call fails; and the limit is raised for the time of a call, because every
combination of type, head size and layout compiles anew.

Slower than the others here (docs/kernels.md); it is what remains where neither of them runs, and a second opinion.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dit_accel.errors import KernelUnavailable
from dit_accel.plan import BlockPlan

from .even_blocks import SIZE, why_uneven

HEADS = (16, 32, 64, 128, 256)
COMPILATIONS = 64  # of FlexAttention in one process


def why_not(q: Tensor, plan: BlockPlan) -> str | None:
    """Why FlexAttention cannot run this call, or None. q: `[B, H, S, D]`."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}; it runs on CUDA devices."
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {q.dtype}."
    if q.shape[3] not in HEADS:
        return f"head size {q.shape[3]} is not one of {', '.join(map(str, HEADS))}."
    try:
        from torch.nn.attention.flex_attention import flex_attention  # noqa: F401
    except ImportError as error:
        return f"this torch has no FlexAttention ({error})."
    return why_uneven(plan)


def block_sparse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Run it on the current stream. Arguments and results as in `reference.block_sparse`."""
    from torch.nn.attention.flex_attention import BlockMask

    lead = q.shape[:2]
    counts, indices = plan.counts.expand(*lead, -1), plan.indices.expand(*lead, -1, -1)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        counts.contiguous(),
        indices.contiguous(),
        BLOCK_SIZE=(SIZE, SIZE),
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,  # of the backward
    )
    try:
        with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
            return _compiled()(q, k, v, block_mask=mask, scale=scale, return_lse=True)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise KernelUnavailable(
            "block_sparse impl='flex' cannot run this call: torch has compiled FlexAttention for "
            f"{COMPILATIONS} kinds of calls, which is the limit; use impl='triton'."
        ) from error


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
