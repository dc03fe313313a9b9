"""The front door of quantisation: what a quantised call is made of, validation, choice of an implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import UsageError, unknown_name
from dit_accel.kernels.choice import Choice
from dit_accel.kernels.pooling import block_means
from dit_accel.plan import BlockPlan

_CHOICE = Choice("quantize_blocks", __package__)
ROWS = 128  # rows that a copy reserves for each block
# Where values are fp8, row j of each sixteen in k8 holds the token of this number; block_sparse/hopper.py says why.
KEY_ORDER = (0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)
SMALLEST_SCALE = (
    2.0**-40
)  # of a row or block of zeros: with a scale of 0 a masked score, -inf, would become NaN


@dataclass(frozen=True)
class Mode:
    """Number formats of the two products of attention."""

    name: str
    scores: torch.dtype  # of q and k
    values: torch.dtype | None  # of the weights and v; None: as v came


MODES = {
    mode.name: mode
    for mode in (
        Mode("int8_fp8", torch.int8, torch.float8_e4m3fn),
        Mode("fp8", torch.float8_e4m3fn, torch.float8_e4m3fn),
        Mode("int8", torch.int8, None),
    )
}


@dataclass(frozen=True, eq=False)
class Quantised:
    """Copies of q, k and v in which every block begins at a multiple of `ROWS` rows; what lies behind a block is zero.

    `q ≈ q8 * q_scale` row by row. `k - mean ≈ k8 * k_scale` block by block, where `mean` is over all tokens of a head:
    it adds the same to all scores of a row, so weights do not change, and what is left of k is smaller
    (SageAttention, arXiv:2410.02367). `v ≈ v8 * v_scale` channel by channel.
    """

    mode: Mode
    q8: Tensor  # [B, H, Nq * ROWS, D]
    q_scale: Tensor  # fp32 [B, H, Nq * ROWS]
    shift: Tensor  # fp32 [B, H, Nq * ROWS], q times the mean key: what the lse lacks, before scaling
    k8: Tensor  # [B, H, Nk * ROWS, D]
    k_scale: Tensor  # fp32 [B, H, Nk]
    v8: Tensor  # [B, H, D, Nk * ROWS] in fp8, so that products find it in one piece; else [B, H, Nk * ROWS, D]
    v_scale: Tensor  # fp32 [B, H, D], ones if v is not quantised

    def bytes_held(self) -> int:
        tensors = (getattr(self, name) for name in "q8 q_scale shift k8 k_scale v8 v_scale".split())
        return sum(x.numel() * x.element_size() for x in tensors)


def quantize_blocks(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, mode: str, *, impl: str = "auto"
) -> Quantised:
    """Quantise q, k, v `[B, H, S, D]` for the blocks of a plan.

    Args:
        q, k, v: float32, float16 or bfloat16, any strides.
        plan: whose blocks; none longer than `ROWS`.
        mode: a name of `MODES`.
        impl: "reference", "triton", or "auto": "triton" on CUDA, else "reference". A named one runs or raises.

    Raises:
        UnknownNameError: no such mode or implementation.
        UsageError: a block is longer than `ROWS`.
        KernelUnavailable: the named implementation cannot run this call.
    """
    if mode not in MODES:
        raise unknown_name("quantised mode", mode, tuple(MODES))
    longest = max(plan.max_q_block, plan.max_k_block)
    if longest > ROWS:
        raise UsageError(f"Quantised blocks hold at most {ROWS} tokens; the plan's longest holds {longest}.")
    match choose(q, impl):
        case "reference":
            from .reference import quantize_blocks as run
        case "triton":
            from .triton import quantize_blocks as run
    with torch.no_grad():
        return run(q, k, v, mean_key(k, plan), plan, MODES[mode])


def mean_key(k: Tensor, plan: BlockPlan) -> Tensor:
    """Mean key of each head, fp32 `[B, H, D]`, from the means of the key blocks: the plan's, or taken anew.

    Any vector would do, it only has to be the same for all keys of a head: so means of another step's keys, in a plan
    that is used again, cost accuracy at most.
    """
    means = plan.key_means
    if means is None:
        means = block_means(k.transpose(1, 2), plan.k_starts, plan.max_k_block)
    weights = plan.k_starts.diff(dim=-1).float() / plan.n_k_tokens
    return (weights[..., None, :] @ means)[..., 0, :]


def choose(q: Tensor, impl: str = "auto") -> str:
    """The implementation that will run; raises as `quantize_blocks` does."""
    return _CHOICE.choose(impl, q.device.type == "cuda", q)


def why_not(impl: str, q: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can."""
    return _CHOICE.why_not(impl, q)
