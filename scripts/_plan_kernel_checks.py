"""The kernels around a plan against plain torch, at the sizes that real models have; `check_kernels.py` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from dit_accel.kernels import bitmaps, coarse, counting, kmeans, pooling, reorder, selection
from dit_accel.plan import BlockPlan


def check_plan_kernels(device: str) -> Iterator[tuple[str, str | None]]:
    """A title and what is wrong (None: nothing) for each case; the implementation is the one "auto" takes."""
    for tokens, heads, dim in ((4352, 4, 64), (32760, 12, 128), (1000, 3, 72)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield f"pooling {tokens}x{heads}x{dim} {dtype}", _check_pooling(tokens, heads, dim, dtype, device)
            yield (
                f"reordering {tokens}x{heads}x{dim} {dtype}",
                _check_reorder(tokens, heads, dim, dtype, device),
            )
            yield f"k-means {tokens}x{heads}x{dim} {dtype}", _check_kmeans(tokens, heads, dim, dtype, device)
            yield f"coarse {tokens}x{heads}x{dim} {dtype}", _check_coarse(tokens, heads, dim, dtype, device)
    for n_keys in (7, 34, 256, 930, 2000):
        for forcing in (False, True):
            for top_p in (None, 0.3, 0.95):
                title = f"selection of {n_keys}, forced {forcing}, top_p {top_p}"
                yield title, _check_selection(n_keys, forcing, top_p, device)
                yield f"counting, {title}", _check_counting(n_keys, forcing, top_p, device)
                yield f"bitmaps, {title}", _check_bitmaps(n_keys, forcing, top_p, device)


def _check_pooling(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> str | None:
    x = torch.randn(2, tokens, heads, dim, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
    starts = _starts(tokens).to(device)
    means = pooling.block_means(x, starts, 128)
    spread = pooling.block_deviations(x, starts, 128, means)
    directions = pooling.block_directions(x, starts, 128, means[:, :, :1])
    wide = x.double(), starts, 128
    pairs = [
        ("means", means, pooling.block_means(*wide, impl="reference")),
        ("deviations", spread, pooling.block_deviations(*wide, means.double(), impl="reference")),
        (
            "directions",
            directions,
            pooling.block_directions(*wide, means[:, :, :1].double(), impl="reference"),
        ),
    ]
    for name, found, exact in pairs:
        error = (found.double() - exact).abs().max().item()
        if not error <= 4e-6 * max(1.0, exact.abs().max().item()):
            return f"{name}: error {error:.1e}"
    return None


def _starts(tokens: int) -> torch.Tensor:
    """Blocks of three lengths, int32 `[1, 1, N + 1]`."""
    ends = torch.tensor([128, 96, 112]).repeat(tokens).cumsum(0)
    return torch.cat([torch.zeros(1), ends[ends < tokens], torch.tensor([tokens])]).int()[None, None]


def _check_reorder(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> str | None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, heads, dim, generator=generator).to(device, dtype).transpose(1, 2)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)])
    order = order[None].int().to(device)
    taken = reorder.take_rows(x, order)
    if not torch.equal(taken, reorder.take_rows(x, order, impl="reference")):
        return "rows taken are not those asked for"
    return None if torch.equal(reorder.put_rows(taken, order), x) else "rows put back are not those taken"


def _check_coarse(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> str | None:
    generator = torch.Generator().manual_seed(tokens)
    out, q, k, v = (
        torch.randn(2, heads, tokens, dim, generator=generator).to(device, dtype) for _ in range(4)
    )
    starts = _starts(tokens).to(device)
    blocks = starts.shape[2] - 1
    plan = BlockPlan.full(
        starts, starts, n_q_tokens=tokens, n_k_tokens=tokens, max_q_block=128, max_k_block=128
    )
    masses = torch.randn(2, heads, blocks, blocks, generator=generator).to(device)
    lse = torch.randn(2, heads, tokens, generator=generator).to(device) + 5
    rest = masses[..., 0] + 5
    for title, asked in (
        ("row", replace(plan, coarse=masses)),
        ("block", replace(plan, coarse=masses, rest=rest)),
    ):
        wide = (x.double() for x in (out, lse, q, k, v))
        exact = coarse.add_block_means(*wide, asked, impl="reference")
        low = coarse.add_block_means(out.clone(), lse, q, k, v, asked, impl="reference").double()
        # The kernel also rounds means and weights to 16 bits before it multiplies.
        once_more = 0.0 if dtype == torch.float32 else 1e-2 * exact.abs().max().item()
        allowed = 2 * (low - exact).abs().max().item() + once_more + 1e-5
        error = (coarse.add_block_means(out.clone(), lse, q, k, v, asked).double() - exact).abs().max().item()
        if not error <= allowed:
            return f"by {title}: error {error:.1e}, allowed {allowed:.1e}"
    return None


def _check_kmeans(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> str | None:
    x = torch.randn(2, tokens, heads, dim, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
    x, clusters = x.transpose(1, 2), round(3.64 * tokens**0.5)
    centroids = x[:, :, :clusters] * 0.5
    labels = kmeans.nearest_centroids(x, centroids)
    wide = x.double(), centroids.double()
    nearest = kmeans.nearest_centroids(*wide, impl="reference")
    apart = [
        (wide[0] - reorder.take_rows(wide[1], rows, impl="reference")).square_().sum(-1)
        for rows in (labels, nearest)
    ]
    farther = (apart[0] - apart[1]).max().item()
    if not farther <= 4e-6 * wide[0].square().sum(-1).max().item():
        return f"labels: a centroid is {farther:.1e} farther than the nearest"
    order, starts = kmeans.sort_by_label(labels, clusters)
    right = kmeans.sort_by_label(labels, clusters, impl="reference")
    if not (torch.equal(order, right[0]) and torch.equal(starts, right[1])):
        return "the sort is not the stable one"
    means = kmeans.cluster_means(x, order, starts, centroids)
    error = (means - kmeans.cluster_means(x, order, starts, centroids, impl="reference")).abs().max().item()
    if not error <= 4e-6 * max(1.0, x.abs().max().item()):
        return f"means: error {error:.1e}"
    runs = torch.arange(0, tokens + 1, 8, dtype=torch.int32, device=device)
    if not torch.equal(kmeans.overlaps(starts, runs), kmeans.overlaps(starts, runs, impl="reference")):
        return "overlaps: shares are wrong"
    return None


def _check_selection(n_keys: int, forcing: bool, top_p: float | None, device: str) -> str | None:
    generator = torch.Generator().manual_seed(n_keys)
    scores = torch.randn(2, 3, 40, n_keys, generator=generator)
    scores[0] = (scores[0] * 2).round()  # ties
    shares = torch.randint(0, 3, scores.shape, generator=generator).float() / 2048  # sums are exact
    forced = (torch.rand(40, n_keys, generator=generator) < 0.05).to(device) if forcing else None
    scores, shares = scores.to(device), None if top_p is None else shares.to(device)
    arguments = (scores, forced, max(1, n_keys // 4), top_p, shares)
    above = 1.5 if forcing else None
    counts, indices = selection.select_blocks(*arguments, above=above)
    right_counts, right_indices = selection.select_blocks(*arguments, above=above, impl="reference")
    if not torch.equal(counts, right_counts):
        return f"{int((counts != right_counts).sum())} of {counts.numel()} counts are wrong"
    wrong = int((indices != right_indices).sum())
    return f"{wrong} of {indices.numel()} indices are wrong" if wrong else None


def _check_bitmaps(n_keys: int, forcing: bool, top_p: float | None, device: str) -> str | None:
    """`forcing` tells heads apart; `top_p` is the share that is kept."""
    generator = torch.Generator().manual_seed(n_keys)
    mask = torch.rand(2, 3 if forcing else 1, 20, n_keys, generator=generator) < (top_p or 0.0)
    plan = BlockPlan.from_mask(mask.to(device), [*range(21)], [*range(n_keys + 1)])
    bits = bitmaps.pack_lists(plan)
    if not torch.equal(bits, bitmaps.pack_lists(plan, impl="reference")):
        return "the bitmap is not that of the lists"
    counts, indices = bitmaps.unpack_lists(bits, n_keys)
    back = replace(plan, counts=counts, indices=indices)
    return None if torch.equal(back.to_mask(), plan.to_mask()) else "the lists are not those of the bitmap"


def _check_counting(n_keys: int, forcing: bool, top_p: float | None, device: str) -> str | None:
    """`forcing` tells heads apart; `top_p` is the share that is kept."""
    generator = torch.Generator().manual_seed(n_keys)
    mask = torch.rand(2, 3 if forcing else 1, n_keys, n_keys, generator=generator) < (top_p or 0.0)
    starts = [0, *torch.randint(0, 129, (n_keys,), generator=generator).cumsum(0).tolist()]
    plan = BlockPlan.from_mask(mask.to(device), starts, starts)
    sizes = torch.tensor(starts).diff().double()
    right = int(torch.einsum("bhqk,q,k->", mask.double(), sizes, sizes))
    counted = int(counting.count_pairs(plan))
    return None if counted == right else f"{counted} pairs instead of {right}"
