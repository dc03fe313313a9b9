"""Which of torch's attention kernels is the quickest here: a report against a slow dense baseline says nothing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.bench.stopwatch import seconds_of

_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_ROUNDS = 5
# `MATH` writes out all scores, in float32 at the least; more than this is not worth a comparison.
_MOST_SCORES = 2**30  # bytes


@dataclass(frozen=True)
class DenseKernel:
    """One of torch's attention kernels, and its time for one self-attention of the model."""

    name: str  # "flash_attention", ...
    milliseconds: float


def rank_kernels(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> list[DenseKernel]:
    """The kernels that can run such an attention without a mask, the quickest first.

    Args:
        shape: of queries, keys and values `[B, H, S, D]`.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    qkv = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    batch, heads, tokens, _ = shape
    found = []
    for name in _BACKENDS:
        if name == "MATH" and 4 * batch * heads * tokens**2 > _MOST_SCORES:
            continue
        with torch.no_grad(), sdpa_kernel([_backend(name)]):
            try:
                with warnings.catch_warnings(action="ignore"):  # torch warns of each reason against a kernel
                    scaled_dot_product_attention(*qkv)
            except RuntimeError:  # it cannot run this, and torch has no other way to ask
                continue
            times = [seconds_of(lambda: scaled_dot_product_attention(*qkv), device) for _ in range(_ROUNDS)]
        found.append(DenseKernel(name.lower(), median(times) * 1e3))
    return sorted(found, key=lambda kernel: kernel.milliseconds)


@contextlib.contextmanager
def using(kernels: Sequence[DenseKernel]) -> Iterator[None]:
    """Torch's attention by the first of these kernels, and by the next where one cannot (a mask, say).

    Args:
        kernels: none leaves the choice to torch.
    """
    if not kernels:
        yield
        return
    names = [kernel.name.upper() for kernel in kernels]
    names += [] if "MATH" in names else ["MATH"]  # which takes everything
    with sdpa_kernel([_backend(name) for name in names], set_priority=True):
        yield


def _backend(name: str) -> SDPBackend:
    return getattr(SDPBackend, name)
