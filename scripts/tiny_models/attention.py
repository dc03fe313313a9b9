"""The faster of torch's two fused attention kernels that can be used, measured where it will run."""

from __future__ import annotations

import contextlib
import time

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .ranks import Ranks

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def prefer_fastest(ranks: Ranks, batch: int, tokens: int, heads: int, width: int, joint: bool):
    """A context in which attention of so many tokens, and heads so wide, takes the faster kernel; on a CPU none.

    Attention that is `joint` takes flash attention: in compiled blocks cuDNN's backward ended at an illegal address
    with 4,096 + 48 and with 4,096 + 64 tokens (torch 2.11, H200), though alone, as it is timed here, it ran.
    """
    if not ranks.device.startswith("cuda"):
        return contextlib.nullcontext()
    shape = (batch, tokens, heads, width)  # laid out as projections leave it
    if joint:
        return sdpa_kernel([BACKENDS[0], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)
    seconds = [_time_backend(backend, ranks.device, shape) for backend in BACKENDS]
    best = BACKENDS[int(ranks.agree(float(seconds[1] < seconds[0])))]
    if ranks.first:
        told = ", ".join(f"{b.name} {s * 1e3:.2f} ms" for b, s in zip(BACKENDS, seconds, strict=True))
        print(f"a layer's attention, forward and backward: {told}; taking {best.name}", flush=True)
    others = [b for b in BACKENDS if b != best]
    return sdpa_kernel([best, *others, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def _time_backend(backend: SDPBackend, device: str, shape: tuple[int, ...]) -> float:
    """Seconds of one layer's attention, forward and backward; best of five."""
    q, k, v = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)
        for _ in range(3)
    )
    times = []
    with sdpa_kernel(backend):
        for _ in range(7):
            torch.cuda.synchronize()
            began = time.perf_counter()
            F.scaled_dot_product_attention(q, k, v).sum().backward()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return min(times[2:])
