"""The front door of dense attention: choose a kernel, run it. No masks, no causality, no gradients.

Ours first where it was measured to be the fastest: with heads of 128 the Hopper kernel, reading every block, takes 0.93
to 0.95 of cuDNN's time on an H200; with heads of 64 it takes 1.02 and flash-attn-4 1.00 to 1.04 (docs/kernels.md).
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
HOPPER_FROM = {128: 4096}  # keys from which the Hopper kernel was measured to be the fastest, by head size


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
    plan: BlockPlan | None = None,
) -> Tensor:
    """Softmax attention of every query to every key.

    Args:
        q: `[B, S, H, D]`; k, v: the same with their own S.
        scale: factor of the scores; None is `D ** -0.5`.
        impl: one of `IMPLEMENTATIONS`, or "auto" (`choose`). A named one runs or raises.
        plan: `full_plan` of these lengths; making it takes six launches, so who calls often makes it once.

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
    plan = plan or full_plan(q.shape[1], k.shape[1], q.device)
    name = choose(q, k, v, impl, plan)
    if name in ("hopper", "flash4"):
        from dit_accel.kernels.block_sparse import block_sparse

        return block_sparse(q, k, v, plan, scale=scale, impl=name)[0]
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    if name == "sdpa":
        return scaled_dot_product_attention(*by_head, scale=scale).transpose(1, 2)
    with sdpa_kernel(BACKENDS[name]):
        return scaled_dot_product_attention(*by_head, scale=scale).transpose(1, 2)


def choose(q: Tensor, k: Tensor, v: Tensor, impl: str = "auto", plan: BlockPlan | None = None) -> str:
    """The implementation that will run. Arguments and errors as in `attend`.

    "auto" is the first of `by_speed` that can run.
    """
    if impl == "auto":
        plan = plan or full_plan(q.shape[1], k.shape[1], q.device)
        on_hopper = why_not("hopper", q, k, v, plan) is None
        names = by_speed(q.shape[3], k.shape[1], on_hopper)
        return next(name for name in names if why_not(name, q, k, v, plan) is None)
    reason = why_not(impl, q, k, v, plan)
    if reason is not None:
        raise KernelUnavailable(f"dense attention impl={impl!r} cannot run this call: {reason}")
    return impl


def by_speed(head: int, keys: int, on_hopper: bool) -> tuple[str, ...]:
    """The implementations, the fastest first, for heads of so many numbers and so many keys."""
    if on_hopper and keys < HOPPER_FROM.get(head, keys + 1):
        return ("cudnn", "flash", "hopper", "flash4", "sdpa")
    return IMPLEMENTATIONS


def why_not(impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None = None) -> str | None:
    """Why `impl` cannot run this call, or None if it can. Arguments as in `attend`."""
    if impl not in IMPLEMENTATIONS:
        raise unknown_name("dense implementation", impl, (*IMPLEMENTATIONS, "auto"))
    if impl == "sdpa":
        return None
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}; it runs on CUDA devices."
    if impl in ("hopper", "flash4"):
        from dit_accel.kernels import block_sparse

        plan = plan or full_plan(q.shape[1], k.shape[1], q.device)
        return block_sparse.why_not(impl, *(x.transpose(1, 2) for x in (q, k, v)), plan)
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {q.dtype}."
    # What torch itself would say of the call.
    asked = torch.backends.cuda.SDPAParams(*(x.transpose(1, 2) for x in (q, k, v)), None, 0.0, False, False)
    can = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "flash": torch.backends.cuda.can_use_flash_attention,
    }
    return None if can[impl](asked) else "this torch cannot run it on these tensors."


def full_plan(n_q_tokens: int, n_k_tokens: int, device: torch.device) -> BlockPlan:
    """The plan that reads every block. Made on the device: nothing waits."""
    q_starts, k_starts = (uniform_starts(n, BLOCK, device) for n in (n_q_tokens, n_k_tokens))
    n_q, n_k = q_starts.shape[2] - 1, k_starts.shape[2] - 1
    counts = torch.full((1, 1, n_q), n_k, dtype=torch.int32, device=device)
    indices = torch.arange(n_k, dtype=torch.int32, device=device).repeat(1, 1, n_q, 1)
    lengths = min(BLOCK, n_q_tokens), min(BLOCK, n_k_tokens)
    return BlockPlan(
        counts, indices, q_starts, k_starts, n_q_tokens, n_k_tokens, *lengths, even_k=True, even_q=True
    )
