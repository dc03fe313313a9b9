"""k-means in Triton: products that keep only the nearest, a counting sort, and sums of bounded runs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_HEAD = 256
MOST_CLUSTERS = 4095  # a program holds an offset of each cluster
CHUNK = 256  # tokens that one program of the sort counts and places
COMPARED = 32  # tokens that those of a chunk are compared with at once
COLUMNS = 32  # clusters that one program of the sort sums over the chunks
CHUNKS = 64  # chunks at once there
CLUSTERS = 8  # that one program of `overlaps` compares with all runs
RUN = 128  # most tokens of a cluster that one program sums
ROWS = 32  # of these, or of the sums of runs, at once; and centroids that one program rounds


@dataclass(frozen=True)
class Config:
    """Shape of a program of `nearest_kernel`."""

    block_m: int  # tokens
    block_n: int  # centroids at once
    warps: int
    stages: int


def config_for(dim: int, dtype: torch.dtype) -> Config:
    """What fits into registers, and into 99 KB of shared memory."""
    if dtype == torch.float32:  # without tensor cores
        return Config(32, 32, 4, 2)
    if dim <= 128:
        return Config(128, 64, 8, 3)
    return Config(64, 64, 4, 2)


def padded_head(dim: int) -> int:
    """Tensor cores take at least 16 numbers."""
    return max(16, triton.next_power_of_2(dim))


def bins_for(n_clusters: int) -> int:
    """A power of two above the number of clusters: the last bin is that of tokens that are not there."""
    return max(16, triton.next_power_of_2(n_clusters + 1))


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return not isinstance(nearest_kernel, triton.JITFunction)


def why_not(x: Tensor, n_clusters: int) -> str | None:
    """Why these kernels cannot run, or None. x: tokens `[B, H, S, D]`, or labels or offsets `[B, H, N]`."""
    if x.device.type != "cuda" and not interpreting():
        return f"the tensors are on {x.device}; it runs on CUDA devices."
    if n_clusters > MOST_CLUSTERS:
        return f"{n_clusters} clusters are more than {MOST_CLUSTERS}."
    if x.dim() == 3:
        return None
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {x.dtype}."
    if x.shape[3] > LARGEST_HEAD:
        return f"head size {x.shape[3]} is above {LARGEST_HEAD}."
    return None


def nearest_centroids(x: Tensor, centroids: Tensor) -> Tensor:
    """Two launches on the current stream. Arguments and result as in `api.nearest_centroids`."""
    batch, heads, tokens, dim = x.shape
    clusters, padded = centroids.shape[2], padded_head(dim)
    config = config_for(padded, x.dtype)
    # padded on both sides, so that the loop over blocks needs no masks
    rows = triton.cdiv(clusters, config.block_n) * config.block_n
    rounded = torch.empty(batch, heads, rows, padded, dtype=x.dtype, device=x.device)
    halves = torch.empty(batch, heads, rows, dtype=torch.float32, device=x.device)
    labels = torch.empty(batch, heads, tokens, dtype=torch.int32, device=x.device)
    with _device_of(x):
        round_kernel[(rows // ROWS, heads, batch)](
            *(centroids, rounded, halves, *centroids.stride(), heads, clusters, rows),
            DIM=dim,
            BLOCK_D=padded,
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=True,  # no longer the default from Triton 3.10 on
        )
        nearest_kernel[(triton.cdiv(tokens, config.block_m), heads, batch)](
            *(x, rounded, halves, labels, *x.stride(), heads, tokens, rows),
            DIM=dim,
            BLOCK_D=padded,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            # The interpreter multiplies the bit patterns of bfloat16 operands, silently.
            UPCAST=interpreting() and x.dtype == torch.bfloat16,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    return labels


def sort_by_label(labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Four launches on the current stream. Arguments and results as in `api.sort_by_label`."""
    batch, heads, tokens = labels.shape
    labels = labels.contiguous()
    chunks, bins = triton.cdiv(tokens, CHUNK), bins_for(n_clusters)
    before, totals, order, starts = (
        torch.empty(batch, heads, *shape, dtype=torch.int32, device=labels.device)
        for shape in ((chunks, n_clusters), (n_clusters,), (tokens,), (n_clusters + 1,))
    )
    if labels.numel() == 0:
        return order, starts.zero_()
    with _device_of(labels):
        count_labels_kernel[(chunks, heads, batch)](
            *(labels, before, heads, tokens, n_clusters, chunks), BINS=bins, CHUNK=CHUNK, num_warps=4
        )
        sum_chunks_kernel[(triton.cdiv(n_clusters, COLUMNS), heads, batch)](
            *(before, totals, heads, n_clusters, chunks), COLUMNS=COLUMNS, CHUNKS=CHUNKS, num_warps=4
        )
        sum_clusters_kernel[(heads, batch)](totals, starts, heads, n_clusters, BINS=bins, num_warps=4)
        place_tokens_kernel[(chunks, heads, batch)](
            *(labels, before, starts, order, heads, tokens, n_clusters, chunks),
            CHUNK=CHUNK,
            COMPARED=COMPARED,
            num_warps=8,
        )
    return order, starts


def cluster_means(x: Tensor, order: Tensor, starts: Tensor, previous: Tensor) -> Tensor:
    """Two launches on the current stream. Arguments and result as in `api.cluster_means`."""
    batch, heads, tokens, dim = x.shape
    clusters = previous.shape[2]
    order, starts = order.contiguous(), starts.contiguous()
    runs = tokens // RUN + clusters  # enough for any clusters
    sums = torch.empty(batch, heads, runs, dim, dtype=torch.float32, device=x.device)
    out = torch.empty(batch, heads, clusters, dim, dtype=torch.float32, device=x.device)
    shape = {"DIM": dim, "BLOCK_D": padded_head(dim), "BINS": bins_for(clusters), "RUN": RUN, "ROWS": ROWS}
    with _device_of(x):
        sum_runs_kernel[(runs, heads, batch)](
            *(x, order, starts, sums, *x.stride(), heads, tokens, clusters, runs),
            **shape,
            num_warps=4,
            enable_fp_fusion=True,
        )
        sum_means_kernel[(clusters, heads, batch)](
            *(sums, starts, previous, out, *previous.stride(), heads, clusters, runs),
            **shape,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def overlaps(starts: Tensor, runs: Tensor) -> Tensor:
    """One launch on the current stream. Arguments and result as in `api.overlaps`."""
    batch, heads, ends = starts.shape
    starts, runs, n_runs = starts.contiguous(), runs.contiguous(), len(runs) - 1
    out = torch.empty(batch, heads, ends - 1, n_runs, dtype=torch.float32, device=starts.device)
    with _device_of(starts):
        overlaps_kernel[(triton.cdiv(ends - 1, CLUSTERS), heads, batch)](
            *(starts, runs, out, heads, ends - 1, n_runs),
            CLUSTERS=CLUSTERS,
            COLUMNS=128,
            num_warps=4,
        )
    return out


def _device_of(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# Numbers that follow the lengths of a call, not its kind: specialising on them would compile anew for each length.
# Strides of rows of D numbers are not among them: that all of them are multiples of 16 lets a thread move 16 bytes.
ROUND_UNSPECIALIZED = ("heads", "clusters", "rows")
NEAREST_UNSPECIALIZED = ("heads", "tokens")  # `rows` is a multiple of 16 always
SORT_UNSPECIALIZED = ("heads", "tokens", "clusters", "chunks")
RUNS_UNSPECIALIZED = ("heads", "tokens", "clusters", "runs")
OVERLAPS_UNSPECIALIZED = ("heads", "clusters", "n_runs")
MEANS_UNSPECIALIZED = ("heads", "clusters", "runs")


@triton.jit(do_not_specialize=ROUND_UNSPECIALIZED)
def round_kernel(
    centroids, rounded, halves,
    stride_cb, stride_ch, stride_cs, stride_cd,
    heads, clusters, rows,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: some centroids of one head in the tokens' type, and half of the square of their lengths."""
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK_D)
    valid = (row < clusters)[:, None] & (lanes < DIM)[None, :]
    p_c = centroids + i_b * stride_cb + i_h * stride_ch
    place = row.to(tl.int64)[:, None] * stride_cs + lanes[None, :] * stride_cd
    b_c = tl.load(p_c + place, mask=valid, other=0.0).to(rounded.dtype.element_ty)
    out = (i_b * heads + i_h) * rows + row
    tl.store(rounded + out[:, None] * BLOCK_D + lanes[None, :], b_c)
    full = b_c.to(tl.float32)
    # one that is not there is infinitely far
    tl.store(halves + out, tl.where(row < clusters, tl.sum(full * full, 1) * 0.5, float("inf")))


@triton.jit(do_not_specialize=NEAREST_UNSPECIALIZED)
def nearest_kernel(
    x, rounded, halves, labels,
    stride_xb, stride_xh, stride_xs, stride_xd,
    heads, tokens, rows,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: the labels of one block of tokens of one head.

    Each column of the running maximum stands for every BLOCK_N-th centroid: columns meet once, behind the loop.
    """
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    inside = (token < tokens)[:, None] & (lanes < DIM)[None, :]
    p_x = x + i_b * stride_xb + i_h * stride_xh
    place = token.to(tl.int64)[:, None] * stride_xs + lanes[None, :] * stride_xd
    b_x = tl.load(p_x + place, mask=inside, other=0.0)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    p_c = rounded + (i_b * heads + i_h) * rows * BLOCK_D + column[None, :] * BLOCK_D + lanes[:, None]
    p_half = halves + (i_b * heads + i_h) * rows + column
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), dtype=tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for first in range(0, rows, BLOCK_N):
        b_c = tl.load(p_c + first * BLOCK_D)  # [D, N]
        if UPCAST:
            b_c = b_c.to(tl.float32)
        half = tl.load(p_half + first)
        score = tl.dot(b_x, b_c, input_precision="ieee") - half[None, :]
        nearer = score > best  # of equals the one found first
        best = tl.where(nearer, score, best)
        found = tl.where(nearer, first, found)
    nearest = tl.max(best, 1)
    # a row of NaN has found nothing, and takes 0
    label = tl.min(tl.where(best == nearest[:, None], found + column[None, :], rows), 1)
    tl.store(labels + (i_b * heads + i_h) * tokens + token, label, mask=token < tokens)


@triton.jit(do_not_specialize=SORT_UNSPECIALIZED)
def count_labels_kernel(
    labels, counts,
    heads, tokens, clusters, chunks,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: how many tokens of one chunk each cluster has; `counts` is `[B, H, chunks, K]`."""
    i_chunk = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    token = i_chunk * CHUNK + tl.arange(0, CHUNK)
    label = tl.load(labels + head * tokens + token, mask=token < tokens, other=BINS - 1)
    column = tl.arange(0, BINS)
    tl.store(
        counts + (head * chunks + i_chunk) * clusters + column,
        tl.histogram(label, BINS),
        mask=column < clusters,
    )


@triton.jit(do_not_specialize=SORT_UNSPECIALIZED)
def sum_chunks_kernel(
    counts, totals,
    heads, clusters, chunks,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: for some clusters of one head, counts become those of all chunks before; and their totals."""
    head = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        there = (chunk < chunks)[:, None] & (column < clusters)[None, :]
        p_count = counts + (head * chunks + chunk)[:, None] * clusters + column[None, :]
        count = tl.load(p_count, mask=there, other=0)
        tl.store(p_count, total[None, :] + tl.cumsum(count, 0) - count, mask=there)
        total += tl.sum(count, 0)
    tl.store(totals + head * clusters + column, total, mask=column < clusters)


@triton.jit(do_not_specialize=SORT_UNSPECIALIZED)
def sum_clusters_kernel(totals, starts, heads, clusters, BINS: tl.constexpr):
    """One program: where the clusters of one head begin, and where the last one ends."""
    head = tl.program_id(1).to(tl.int64) * heads + tl.program_id(0)
    column = tl.arange(0, BINS)
    total = tl.load(totals + head * clusters + column, mask=column < clusters, other=0)
    tl.store(starts + head * (clusters + 1) + column, tl.cumsum(total, 0) - total, mask=column <= clusters)


@triton.jit(do_not_specialize=SORT_UNSPECIALIZED)
def place_tokens_kernel(
    labels, before, starts, order,
    heads, tokens, clusters, chunks,
    CHUNK: tl.constexpr,
    COMPARED: tl.constexpr,
):  # fmt: skip
    """One program: the tokens of one chunk go behind those of their clusters in the chunks before."""
    i_chunk = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    token = i_chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < tokens
    label = tl.load(labels + head * tokens + token, mask=inside, other=0)
    rank = tl.zeros([CHUNK], dtype=tl.int32)
    for first in range(0, CHUNK, COMPARED):
        other = i_chunk * CHUNK + first + tl.arange(0, COMPARED)
        others = tl.load(labels + head * tokens + other, mask=other < tokens, other=-1)
        same = (label[:, None] == others[None, :]) & (other[None, :] < token[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    place = tl.load(starts + head * (clusters + 1) + label, mask=inside, other=0) + rank
    place += tl.load(before + (head * chunks + i_chunk) * clusters + label, mask=inside, other=0)
    tl.store(order + head * tokens + place, token, mask=inside)


@triton.jit(do_not_specialize=RUNS_UNSPECIALIZED)
def sum_runs_kernel(
    x, order, starts, sums,
    stride_xb, stride_xh, stride_xs, stride_xd,
    heads, tokens, clusters, runs,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BINS: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the sum of one run of at most RUN tokens, all of one cluster.

    A cluster has as many runs as it needs, clusters follow one another, and runs that none needs do nothing.
    """
    i_run = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    head = i_b * heads + i_h
    p_start = starts + head * (clusters + 1)
    column = tl.arange(0, BINS)
    size = tl.load(p_start + column + 1, mask=column < clusters, other=0)
    size -= tl.load(p_start + column, mask=column < clusters, other=0)
    ends = tl.cumsum((size + RUN - 1) // RUN, 0)  # runs up to each cluster's last
    passed = ends <= i_run
    owner = tl.sum((passed & (column < clusters)).to(tl.int32), 0)
    if owner < clusters:
        first = tl.max(tl.where(passed, ends, 0), 0)
        low = tl.load(p_start + owner) + (i_run - first) * RUN
        high = tl.minimum(low + RUN, tl.load(p_start + owner + 1))
        lanes = tl.arange(0, BLOCK_D)
        total = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        p_x = x + i_b * stride_xb + i_h * stride_xh
        for begin in range(low, high, ROWS):
            row = begin + tl.arange(0, ROWS)
            token = tl.load(order + head * tokens + row, mask=row < high, other=0).to(tl.int64)
            inside = (row < high)[:, None] & (lanes < DIM)[None, :]
            place = token[:, None] * stride_xs + lanes[None, :] * stride_xd
            total += tl.load(p_x + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + (head * runs + i_run) * DIM + lanes, tl.sum(total, 0), mask=lanes < DIM)


@triton.jit(do_not_specialize=MEANS_UNSPECIALIZED)
def sum_means_kernel(
    sums, starts, previous, out,
    stride_pb, stride_ph, stride_ps, stride_pd,
    heads, clusters, runs,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BINS: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the mean of one cluster, from the sums of its runs in their order."""
    i_cluster = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    head = i_b * heads + i_h
    p_start = starts + head * (clusters + 1)
    lanes = tl.arange(0, BLOCK_D)
    p_out = out + (head * clusters + i_cluster) * DIM + lanes
    count = tl.load(p_start + i_cluster + 1) - tl.load(p_start + i_cluster)
    if count == 0:
        p_c = previous + i_b * stride_pb + i_h * stride_ph + i_cluster.to(tl.int64) * stride_ps
        b_c = tl.load(p_c + lanes * stride_pd, mask=lanes < DIM, other=0.0)
        tl.store(p_out, b_c.to(tl.float32), mask=lanes < DIM)
    else:
        column = tl.arange(0, BINS)
        size = tl.load(p_start + column + 1, mask=column < i_cluster, other=0)
        size -= tl.load(p_start + column, mask=column < i_cluster, other=0)
        low = tl.sum((size + RUN - 1) // RUN, 0)
        high = low + (count + RUN - 1) // RUN
        total = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        for begin in range(low, high, ROWS):
            row = begin + tl.arange(0, ROWS)
            inside = (row < high)[:, None] & (lanes < DIM)[None, :]
            p_sum = sums + (head * runs + row)[:, None] * DIM + lanes[None, :]
            total += tl.load(p_sum, mask=inside, other=0.0)
        tl.store(p_out, tl.sum(total, 0) / count.to(tl.float32), mask=lanes < DIM)


@triton.jit(do_not_specialize=OVERLAPS_UNSPECIALIZED)
def overlaps_kernel(
    starts, edges, out,
    heads, clusters, n_runs,
    CLUSTERS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: some clusters of one head against all runs."""
    head = tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)
    cluster = tl.program_id(0) * CLUSTERS + tl.arange(0, CLUSTERS)
    real = cluster < clusters
    p_start = starts + head * (clusters + 1) + cluster
    low = tl.load(p_start, mask=real, other=0)[:, None]
    high = tl.load(p_start + 1, mask=real, other=0)[:, None]
    whole = tl.maximum(high - low, 1)
    for first in range(0, n_runs, COLUMNS):
        run = first + tl.arange(0, COLUMNS)
        begin = tl.load(edges + run, mask=run < n_runs, other=0)[None, :]
        end = tl.load(edges + run + 1, mask=run < n_runs, other=0)[None, :]
        shared = tl.maximum(tl.minimum(high, end) - tl.maximum(low, begin), 0)
        p_out = out + (head * clusters + cluster)[:, None] * n_runs + run[None, :]
        share = tl.div_rn(shared.to(tl.float32), whole.to(tl.float32))
        tl.store(p_out, share, mask=real[:, None] & (run < n_runs)[None, :])
