"""The front door of dense attention: choose a kernel, run it. No masks, no causality, no gradients.

Ours first: reading every block, the Hopper kernel takes 0.93 of cuDNN's time on an H200 (docs/kernels.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.errors import KernelUnavailable, UsageError, unknown_name
from dit_accel.plan import BlockPlan, uniform_starts

IMPLEMENTATIONS = ("hopper", "flash4", "cudnn", "flash", "sdpa")  # the fastest first, where it can run
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BLOCK = 128


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str = "auto") -> Tensor:
    """Softmax attention of every query to every key.

    Args:
        q: `[B, S, H, D]`; k, v: the same with their own S.
        scale: factor of the scores; None is `D ** -0.5`.
        impl: one of `IMPLEMENTATIONS`, or "auto": the first of them that can run. A named one runs or raises.

    Returns:
        `[B, S, H, D]` in q's dtype.

    Raises:
        UsageError: shapes do not fit together, or an input needs a gradient.
        UnknownNameError: no such implementation.
        KernelUnavailable: the named implementation cannot run this call.
    """
    if q.dim() != 4 or k.shape != v.shape or any(q.shape[i] != k.shape[i] for i in (0, 2, 3)):
        raise UsageError(
            f"q [B, S, H, D] and k, v must agree in B, H and D; got {[tuple(x.shape) for x in (q, k, v)]}."
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise UsageError(
            "An input requires a gradient; not every kernel has one: call it under torch.no_grad()."
        )
    name = choose(q, k, v, impl)
    if name in ("hopper", "flash4"):
        from dit_accel.kernels.block_sparse import block_sparse

        return block_sparse(q, k, v, _full_plan(q, k), scale=scale, impl=name)[0]
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    if name == "sdpa":
        return scaled_dot_product_attention(*by_head, scale=scale).transpose(1, 2)
    with sdpa_kernel(BACKENDS[name]):
        return scaled_dot_product_attention(*by_head, scale=scale).transpose(1, 2)


def choose(q: Tensor, k: Tensor, v: Tensor, impl: str = "auto") -> str:
    """The implementation that will run. Arguments and errors as in `attend`."""
    if impl == "auto":
        return next(name for name in IMPLEMENTATIONS if why_not(name, q, k, v) is None)
    reason = why_not(impl, q, k, v)
    if reason is not None:
        raise KernelUnavailable(f"dense attention impl={impl!r} cannot run this call: {reason}")
    return impl


def why_not(impl: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why `impl` cannot run this call, or None if it can. Arguments as in `attend`."""
    if impl not in IMPLEMENTATIONS:
        raise unknown_name("dense implementation", impl, (*IMPLEMENTATIONS, "auto"))
    if impl == "sdpa":
        return None
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}; it runs on CUDA devices."
    if impl in ("hopper", "flash4"):
        from dit_accel.kernels import block_sparse

        return block_sparse.why_not(impl, *(x.transpose(1, 2) for x in (q, k, v)), _full_plan(q, k))
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {q.dtype}."
    # What torch itself would say of the call.
    asked = torch.backends.cuda.SDPAParams(*(x.transpose(1, 2) for x in (q, k, v)), None, 0.0, False, False)
    can = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "flash": torch.backends.cuda.can_use_flash_attention,
    }
    return None if can[impl](asked) else "this torch cannot run it on these tensors."


def _full_plan(q: Tensor, k: Tensor) -> BlockPlan:
    """Every block is read. Made on the device: nothing waits."""
    q_starts, k_starts = (uniform_starts(x.shape[1], BLOCK, x.device) for x in (q, k))
    n_q, n_k = q_starts.shape[2] - 1, k_starts.shape[2] - 1
    counts = torch.full((1, 1, n_q), n_k, dtype=torch.int32, device=q.device)
    indices = torch.arange(n_k, dtype=torch.int32, device=q.device).repeat(1, 1, n_q, 1)
    return BlockPlan(
        counts, indices, q_starts, k_starts, q.shape[1], k.shape[1], BLOCK, BLOCK, even_k=True, even_q=True
    )
