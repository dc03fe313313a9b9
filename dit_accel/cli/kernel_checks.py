"""Small problems on which every kernel is compared with its reference; `dit-accel doctor` runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer."""

    name: str
    status: str  # "ok" | "absent": not usable here, and nothing to mend | "broken"
    detail: str


def check_kernels() -> Iterator[Check]:
    """Every implementation of every kernel, on the GPU where there is one."""
    from dit_accel.cli.sla_checks import check_gradients, check_linear_attention
    from dit_accel.kernels import (
        bitmaps,
        coarse,
        compaction,
        counting,
        inversion,
        kmeans,
        linear_attention,
        pooling,
        quantize,
        reorder,
        selection,
    )
    from dit_accel.options import IMPLS

    checks: list[tuple[str, Callable[[str], Check]]] = [
        (f"block_sparse/{impl}", _check_block_sparse) for impl in IMPLS if impl != "auto"
    ]
    checks += [(f"pooling/{impl}", _check_pooling) for impl in pooling.IMPLEMENTATIONS]
    checks += [(f"selection/{impl}", _check_selection) for impl in selection.IMPLEMENTATIONS]
    checks += [(f"counting/{impl}", _check_counting) for impl in counting.IMPLEMENTATIONS]
    checks += [(f"compaction/{impl}", _check_compaction) for impl in compaction.IMPLEMENTATIONS]
    checks += [(f"bitmaps/{impl}", _check_bitmaps) for impl in bitmaps.IMPLEMENTATIONS]
    checks += [(f"coarse/{impl}", _check_coarse) for impl in coarse.IMPLEMENTATIONS]
    checks += [(f"reorder/{impl}", _check_reorder) for impl in reorder.IMPLEMENTATIONS]
    checks += [(f"kmeans/{impl}", _check_kmeans) for impl in kmeans.IMPLEMENTATIONS]
    checks += [(f"quantize/{impl}", _check_quantize) for impl in quantize.IMPLEMENTATIONS]
    checks += [(f"linear_attention/{impl}", check_linear_attention) for impl in linear_attention.IMPLEMENTATIONS]
    checks += [(f"gradients/{impl}", check_gradients) for impl in inversion.IMPLEMENTATIONS]
    for name, check in checks:
        try:
            yield check(name)
        except Exception as error:  # a compiler can fail in any way; the line must come all the same
            text = str(error).strip().splitlines()
            yield Check(name, "broken", f"{type(error).__name__}: {text[0] if text else 'no message'}")


def device_for(impl: str):
    """Where an implementation is checked."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and impl != "cpu" else "cpu")


def _check_block_sparse(name: str) -> Check:
    """One executor on a small ragged problem, against the reference in fp64."""
    import torch

    from dit_accel.kernels.block_sparse import block_sparse, why_not
    from dit_accel.plan import BlockPlan

    impl = name.split("/")[1]
    device = device_for(impl)
    dtype = (
        torch.bfloat16 if device.type == "cuda" and impl in ("triton", "hopper", "flash4") else torch.float32
    )
    generator = torch.Generator("cpu").manual_seed(0)
    tokens, block, heads, width = 301, 128, 2, 64  # of the size that every executor takes
    q, k, v = (torch.randn(1, tokens, heads, width, generator=generator) for _ in range(3))
    starts = [*range(0, tokens, block), tokens]
    n = len(starts) - 1
    mask = torch.rand(1, heads, n, n, generator=generator) < 0.5
    mask[..., 0] = True
    plan = BlockPlan.from_mask(mask, starts, starts)
    exact, exact_lse = block_sparse(*(x.to(dtype).double() for x in (q, k, v)), plan, impl="reference")
    inputs = [x.to(device, dtype) for x in (q, k, v)]
    there = BlockPlan.from_mask(mask.to(device), starts, starts)
    reason = why_not(impl, *inputs, there)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    out, lse = block_sparse(*inputs, there, impl=impl)
    error = (out.double().cpu() - exact).abs().max().item() / exact.abs().max().item()
    lse_error = (lse.double().cpu() - exact_lse).abs().max().item()
    told = f"relative error {error:.1e}, lse {lse_error:.1e}"
    return judge(name, dtype, device, max(error, lse_error), told, began)


def _check_pooling(name: str) -> Check:
    """Means of blocks of unequal length, against fp64."""
    import torch

    from dit_accel.kernels.pooling import block_means, why_not

    impl = name.split("/")[1]
    device = device_for(impl)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(1, 301, 2, 64, generator=torch.Generator("cpu").manual_seed(1)).to(dtype)
    starts = torch.tensor([[[0, 128, 200, 301]]], dtype=torch.int32)
    exact = block_means(x.double(), starts, 128, impl="reference")
    there = x.to(device)
    reason = why_not(impl, there)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    means = block_means(there, starts.to(device), 128, impl=impl)
    error = (means.double().cpu() - exact).abs().max().item()
    return judge(name, torch.float32, device, error, f"error {error:.1e}", began)


def _check_selection(name: str) -> Check:
    """Both budgets with forced blocks; the lists must be those of a plain sort."""
    import torch

    from dit_accel.kernels.selection import select_blocks, why_not

    impl = name.split("/")[1]
    device = device_for(impl)
    generator = torch.Generator("cpu").manual_seed(2)
    scores = torch.randn(1, 2, 40, 40, generator=generator).to(device)
    forced = torch.eye(40, dtype=torch.bool, device=device)
    shares = torch.randint(0, 3, scores.shape, generator=generator).to(device).float() / 64
    reason = why_not(impl, scores)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    counts, indices = select_blocks(scores, forced, 10, 0.4, shares, impl=impl)
    order = scores.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    slot = torch.arange(40, device=device)
    read = torch.zeros(*scores.shape[:3], 41, dtype=torch.bool, device=device)
    read.scatter_(3, torch.where(slot < counts[..., None], indices.long(), 40), True)
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(3, order, slot < counts[..., None])
    mass = shares.gather(3, order).cumsum(-1)
    enough = ((mass < 0.4).sum(-1) + 1).clamp(10, 40)
    wrong = int((read[..., :40] != best).sum()) + int((counts != enough).sum())
    return judge(name, torch.float32, device, float(wrong), f"{wrong} wrong choices", began)


def _check_counting(name: str) -> Check:
    """Pairs of a plan with blocks of unequal length, against its mask token by token."""
    import torch

    from dit_accel.kernels.counting import count_pairs, why_not
    from dit_accel.plan import BlockPlan

    impl = name.split("/")[1]
    device = device_for(impl)
    starts = [0, 128, 200, 200, 301]
    mask = torch.rand(2, 3, 4, 4, generator=torch.Generator("cpu").manual_seed(3)) < 0.5
    right = int(BlockPlan.from_mask(mask, starts, starts).to_token_mask().sum())
    plan = BlockPlan.from_mask(mask.to(device), starts, starts)
    reason = why_not(impl, plan)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    wrong = abs(int(count_pairs(plan, impl=impl)) - right)
    return judge(name, torch.float32, device, float(wrong), f"off by {wrong} of {right}", began)


def _check_compaction(name: str) -> Check:
    """Entries that are needed or forced, against the mask."""
    import torch

    from dit_accel.kernels.compaction import compact_lists, why_not
    from dit_accel.plan import BlockPlan

    impl = name.split("/")[1]
    device = device_for(impl)
    generator = torch.Generator("cpu").manual_seed(4)
    starts = [*range(0, 301, 10)]
    mask, needed, forced = (torch.rand(1, 2, 30, 30, generator=generator) < p for p in (0.7, 0.4, 0.1))
    listed = BlockPlan.from_mask(mask, starts, starts)
    needed = needed.gather(3, listed.indices.long())  # beside the lists instead of beside the blocks
    plan = BlockPlan.from_mask(mask.to(device), starts, starts)
    reason = why_not(impl, plan.counts)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    short = compact_lists(plan, needed.to(device), forced[0, 0].to(device), impl=impl)
    wanted = torch.zeros_like(mask).scatter_(3, listed.indices.long(), needed) | forced[:, :1]
    wrong = int((short.to_mask().cpu() != (wanted & mask)).sum())
    return judge(name, torch.float32, device, float(wrong), f"{wrong} wrong entries", began)


def _check_bitmaps(name: str) -> Check:
    """Lists into a bitmap and out again."""
    import torch

    from dit_accel.kernels.bitmaps import pack_lists, unpack_lists, why_not
    from dit_accel.plan import BlockPlan

    impl = name.split("/")[1]
    device = device_for(impl)
    mask = torch.rand(1, 2, 30, 70, generator=torch.Generator("cpu").manual_seed(5)) < 0.4
    plan = BlockPlan.from_mask(mask.to(device), [*range(31)], [*range(71)])
    reason = why_not(impl, plan.counts)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    counts, indices = unpack_lists(pack_lists(plan, impl=impl), 70, impl=impl)
    wrong = int((replace(plan, counts=counts, indices=indices).to_mask().cpu() != mask).sum())
    return judge(name, torch.float32, device, float(wrong), f"{wrong} wrong entries", began)


def _check_coarse(name: str) -> Check:
    """Where all values are alike, mixing with their mean changes nothing."""
    import torch

    from dit_accel.kernels.coarse import add_block_means, why_not
    from dit_accel.plan import BlockPlan

    impl = name.split("/")[1]
    device = device_for(impl)
    starts = [0, 30, 64, 70]
    masses = torch.randn(1, 2, 3, 3, generator=torch.Generator("cpu").manual_seed(6))
    plan = BlockPlan.full(torch.tensor(starts), torch.tensor(starts))
    on_device = {key: getattr(plan, key).to(device) for key in ("counts", "indices", "q_starts", "k_starts")}
    plan = replace(plan, **on_device, coarse=masses.to(device))
    v = torch.linspace(-1, 1, 64, device=device).expand(1, 2, 70, 64).contiguous()
    reason = why_not(impl, v)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    error = float((add_block_means(v.clone(), v[..., 0].clone(), v, v, v, plan, impl=impl) - v).abs().max())
    return judge(name, torch.float32, device, error, f"max error {error:.1e}", began)


def _check_reorder(name: str) -> Check:
    """Rows into another order and back."""
    import torch

    from dit_accel.kernels.reorder import put_rows, take_rows, why_not

    impl = name.split("/")[1]
    device = device_for(impl)
    generator = torch.Generator("cpu").manual_seed(7)
    x = torch.randn(1, 2, 70, 64, generator=generator).to(device)
    order = torch.randperm(70, generator=generator).int()[None, None].to(device)
    reason = why_not(impl, x)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    taken = take_rows(x, order, impl=impl)
    wrong = int((taken != x[:, :, order[0, 0].long()]).sum())
    wrong += int((put_rows(taken, order, impl=impl) != x).sum())
    return judge(name, torch.float32, device, float(wrong), f"{wrong} wrong numbers", began)


def _check_kmeans(name: str) -> Check:
    """One iteration on whole numbers, whose distances are exact."""
    import torch

    from dit_accel.kernels.kmeans import cluster_means, nearest_centroids, overlaps, sort_by_label, why_not

    impl = name.split("/")[1]
    device = device_for(impl)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator("cpu").manual_seed(8)
    x, centroids = (torch.randint(-2, 3, (1, 2, n, 64), generator=generator).float() for n in (301, 20))
    there, seeds = x.to(device, dtype), centroids.to(device, dtype)
    reason = why_not(impl, there, 20)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    labels = nearest_centroids(there, seeds, impl=impl)
    order, starts = sort_by_label(labels, 20, impl=impl)
    means = cluster_means(there, order, starts, seeds, impl=impl)
    runs = torch.tensor([0, 128, 301], dtype=torch.int32, device=device)
    shares = overlaps(starts, runs, impl=impl)
    right = (x[:, :, :, None] - centroids[:, :, None]).square().sum(-1).argmin(-1)
    wrong = int((labels.cpu() != right).sum())
    wrong += int((order.cpu() != right.argsort(dim=-1, stable=True)).sum())
    own = torch.nn.functional.one_hot(right, 20).float()
    sizes = own.sum(2)[..., None]
    exact = torch.where(sizes > 0, own.transpose(2, 3) @ x / sizes.clamp_min(1), centroids)
    whole = (sizes[..., 0] > 0).float()
    error = max(float((means.cpu() - exact).abs().max()), float((shares.cpu().sum(3) - whole).abs().max()))
    return judge(
        name, torch.float32, device, wrong + error, f"{wrong} wrong places, error {error:.1e}", began
    )



def _check_quantize(name: str) -> Check:
    """8-bit integers of queries, put together again."""
    import torch

    from dit_accel.kernels.quantize import ROWS, quantize_blocks, why_not
    from dit_accel.plan import BlockPlan

    impl = name.split("/")[1]
    device = device_for(impl)
    q = torch.randn(1, 2, 301, 64, generator=torch.Generator("cpu").manual_seed(5)).to(device)
    starts = [0, 128, 200, 301]
    plan = BlockPlan.from_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device), starts, starts)
    reason = why_not(impl, q)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    copies = quantize_blocks(q, q, q, plan, "int8", impl=impl)
    rows = torch.cat([torch.arange(b - a) + ROWS * i for i, (a, b) in enumerate(pairwise(starts))]).to(device)
    again = (copies.q8.float() * copies.q_scale[..., None])[:, :, rows]
    steps = float(
        ((again - q).abs() / copies.q_scale[:, :, rows, None]).max()
    )  # half a step is the best possible
    return judge(name, torch.float32, device, max(0.0, steps - 0.5), f"{steps:.3f} steps off", began)


def judge(name: str, dtype, device, error: float, told: str, began: float) -> Check:
    """Whether an error is small enough for the type, and what to say of it."""
    import torch

    allowed = 2e-2 if dtype == torch.bfloat16 else 1e-4
    seconds = time.perf_counter() - began
    told = f"{str(dtype).removeprefix('torch.')} on {device}: {told}, {seconds:.1f} s"
    # Written so that NaN is a failure.
    sound = error <= allowed
    return Check(
        name, "ok" if sound else "broken", told if sound else f"{told}; at most {allowed:g} is allowed"
    )
