"""The kernels around a plan against plain torch, at the sizes that real models have; `check_kernels.py` runs them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dit_accel.kernels import counting, pooling, selection
from dit_accel.plan import BlockPlan


def check_plan_kernels(device: str) -> Iterator[tuple[str, str | None]]:
    """A title and what is wrong (None: nothing) for each case; the implementation is the one "auto" takes."""
    for tokens, heads, dim in ((4352, 4, 64), (32760, 12, 128), (1000, 3, 72)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield f"pooling {tokens}x{heads}x{dim} {dtype}", _check_pooling(tokens, heads, dim, dtype, device)
    for n_keys in (7, 34, 256, 930, 2000):
        for forcing in (False, True):
            for top_p in (None, 0.3, 0.95):
                title = f"selection of {n_keys}, forced {forcing}, top_p {top_p}"
                yield title, _check_selection(n_keys, forcing, top_p, device)
                yield f"counting, {title}", _check_counting(n_keys, forcing, top_p, device)


def _check_pooling(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> str | None:
    x = torch.randn(2, tokens, heads, dim, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
    sizes = torch.tensor([128, 96, 112]).repeat(tokens)
    ends = sizes.cumsum(0)
    starts = torch.cat([torch.zeros(1), ends[ends < tokens], torch.tensor([tokens])]).int()[None, None]
    means = pooling.block_means(x, starts.to(device), 128)
    exact = pooling.block_means(x.double(), starts.to(device), 128, impl="reference")
    error = (means.double() - exact).abs().max().item()
    return None if error <= 2e-6 * max(1.0, exact.abs().max().item()) else f"error {error:.1e}"


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
