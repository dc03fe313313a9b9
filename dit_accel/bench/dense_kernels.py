"""Which of torch's attention kernels is the quickest here: a report against a slow dense baseline says nothing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.bench.stopwatch import seconds_of

_BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
_ROUNDS = 5
# `MATH` writes out all scores, in float32 at the least; more than this is not worth a comparison.
_MOST_SCORES = 2**30  # bytes


def rank_kernels(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The kernels that can run such an attention without a mask, the quickest first.

    Args:
        shape: of queries, keys and values `[B, S, H, D]`.

    Returns:
        Milliseconds of one attention (median) by the kernels' names, "flash_attention" and the like.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    qkv = [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(3)]
    batch, tokens, heads, _ = shape
    found: dict[str, float] = {}
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
        found[name.lower()] = median(times) * 1e3
    return dict(sorted(found.items(), key=lambda item: item[1]))


@contextlib.contextmanager
def using(kernels: Sequence[str]) -> Iterator[None]:
    """Torch's attention by the first of these kernels, and by the next where one cannot (a mask, say).

    Args:
        kernels: names of `rank_kernels`; none leaves the choice to torch.
    """
    if not kernels:
        yield
        return
    names = [kernel.upper() for kernel in kernels if kernel != "math"] + ["MATH"]
    if kernels[0] == "math":  # which takes everything; on a CPU any other would go before it, whatever the order
        names = ["MATH"]
    with sdpa_kernel([_backend(name) for name in names], set_priority=True):
        yield


def _backend(name: str) -> SDPBackend:
    return getattr(SDPBackend, name)
