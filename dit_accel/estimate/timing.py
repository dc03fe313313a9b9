"""Timing: milliseconds of one forward, from what it computes and a GPU's rates.

    products       whole waves of tiles over the matrix rate; of few rows: their weights over the bandwidth
    in between     passes over the tokens, over the bandwidth
    dense          attention's operations over the dense rate of the head's size, longer for a number of tokens that no
                   tile divides and longer with a mask
    sparse         the share kept of these operations over the executor's rate, a fixed time a call, and the plan's cost
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel.estimate.count import Product, Work
from dit_accel.estimate.gpus import Gpu

TILE = 128, 256  # rows and columns of what a multiprocessor computes at a time, of a large matrix product
ALIGNED = 128  # a dense kernel is faster where this divides the number of tokens
_FEW_ROWS = 16  # up to so many a product only reads its weights
BYTES = 2  # of a number; bfloat16 or float16


@dataclass(frozen=True)
class Sparse:
    """A sparse call of one layer."""

    executed: float  # share of dense attention's operations that the executor runs
    tokens: int  # of each row, padding left out
    blocks: int
    predicted: float = 1.0  # how often a plan is predicted, of its calls


@dataclass(frozen=True)
class Times:
    """Milliseconds of one forward."""

    dense_attention: float
    sparse_attention: float  # of which `plan`
    plan: float
    other: float
    host: float = 0.0  # the least that the host needs; 0: not known, and less than the GPU in every case measured

    @property
    def attention(self) -> float:
        return self.dense_attention + self.sparse_attention

    @property
    def total(self) -> float:
        return max(self.attention + self.other, self.host)

    @property
    def attention_share(self) -> float:
        return self.attention / self.total


def product_work(products: Sequence[Product], multiprocessors: int) -> tuple[float, float]:
    """Operations in whole waves of tiles, and bytes of weights that are only read."""
    operations = weights = 0.0
    for product in products:
        if product.rows <= _FEW_ROWS:
            weights += BYTES * product.times * product.inner * product.outer
            continue
        tiles = math.ceil(product.rows / TILE[0]) * math.ceil(product.outer / TILE[1])
        waves = math.ceil(tiles / multiprocessors)
        operations += 2.0 * product.times * waves * multiprocessors * TILE[0] * TILE[1] * product.inner
    return operations, weights


def other_work(work: Work, multiprocessors: int) -> tuple[float, float]:
    """Operations and bytes of everything but self-attention."""
    operations, weights = product_work(work.products, multiprocessors)
    return operations + work.cross_flops, weights + BYTES * work.pass_tokens


def dense_slowdown(work: Work, gpu: Gpu, tokens: int | None = None) -> float:
    """How many times as long dense attention takes as at its best, for its number of tokens and its mask."""
    tokens = work.joint if tokens is None else tokens
    slower = 1.0 if tokens % ALIGNED == 0 else gpu.rate("unaligned_times")
    return slower * (gpu.rate("masked_times") if work.masked else 1.0)


def dense_ms(work: Work, gpu: Gpu, queries: float = 1.0) -> float:
    """Dense self-attention of one layer. queries: share of the tokens that ask."""
    best = work.attention_flops * queries / (gpu.attention_rate(work.head_dim) * 1e9)
    return best * dense_slowdown(work, gpu)


def plan_ms(work: Work, sparse: Sparse, gpu: Gpu) -> float:
    """Predicting one layer's plan: reading queries and keys, then scoring every pair of blocks."""
    read = 2 * BYTES * work.batch * work.heads * work.head_dim * sparse.tokens
    pairs = work.batch * work.heads * sparse.blocks**2
    return gpu.rate("plan_call_ms") + (
        read / (gpu.rate("bandwidth_gbs") * 1e6) + pairs * gpu.rate("plan_ns_a_pair") * 1e-6
    )


def sparse_ms(work: Work, sparse: Sparse, gpu: Gpu, queries: float = 1.0) -> float:
    """Sparse self-attention of one layer, its plan left out."""
    flops = 4 * work.batch * work.heads * work.head_dim * sparse.tokens**2 * sparse.executed * queries
    return gpu.rate("sparse_call_ms") + flops / (gpu.sparse_rate(work.head_dim) * 1e9)


def forward_times(work: Work, gpu: Gpu, layers: Sequence[Sparse | None]) -> Times:
    """A forward over all tokens.

    Args:
        layers: for each layer its sparse call; None: dense.
    """
    dense = sum(layer is None for layer in layers) * dense_ms(work, gpu)
    plans = sum(plan_ms(work, layer, gpu) * layer.predicted for layer in layers if layer is not None)
    sparse = sum(sparse_ms(work, layer, gpu) for layer in layers if layer is not None)
    operations, moved = other_work(work, gpu.multiprocessors)
    other = operations / (gpu.rate("matrix_tflops") * 1e9) + moved / (gpu.rate("bandwidth_gbs") * 1e6)
    return Times(dense, sparse + plans, plans, other)


def region_times(whole: Work, part: Work, gpu: Gpu, layers: Sequence[Sparse | None], *, by_blocks: bool) -> Times:
    """A forward that computes a part of the tokens, which attend to the keys of all.

    Args:
        whole: the forward over all tokens; `part`: the one over those that are computed.
        layers: as of `forward_times`.
        by_blocks: whether whole blocks are chosen, which attend sparsely; single tokens attend densely.
    """
    share = part.joint / whole.joint
    if not by_blocks:
        layers = [None] * len(layers)
    dense = sum(layer is None for layer in layers) * dense_ms(whole, gpu, share)
    plans = sum(plan_ms(whole, layer, gpu) * layer.predicted for layer in layers if layer is not None)
    sparse = sum(sparse_ms(whole, layer, gpu, share) for layer in layers if layer is not None)
    operations, moved = other_work(part, gpu.multiprocessors)
    # keys and values of the tokens computed are put among those that are kept
    width = whole.heads * whole.head_dim
    moved += gpu.rate("region_passes") * whole.layers * BYTES * part.batch * part.joint * width
    other = operations / (gpu.rate("matrix_tflops") * 1e9) + moved / (gpu.rate("bandwidth_gbs") * 1e6)
    host = gpu.rate("region_host_ms_a_layer") * len(layers) if by_blocks else 0.0
    return Times(dense, sparse + plans, plans, other, host)
