"""The gradients of block-sparse attention on a GPU, against float64; `check_kernels.py` runs them.

The reference in float64 is the oracle, and run in the inputs' own type it says what that type costs: a kernel may err
twice as much. It has itself been compared with dense autograd (tests/kernels/test_block_sparse_backward.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from _kernel_cases import Case, make, poisoned_memory
from torch import Tensor

from dit_accel.kernels.block_sparse import block_sparse_trainable, why_not
from dit_accel.kernels.block_sparse.backward import workspace_bytes
from dit_accel.kernels.inversion import invert_plan
from dit_accel.plan import BlockPlan, uniform_starts

SHAPES = {
    "ragged": dict(batch=2, heads=3, q_blocks=(128, 128, 77), k_blocks=(128, 128, 128, 1)),
    "64 x 64": dict(batch=2, heads=3, q_blocks=(64,) * 5 + (33,), k_blocks=(64,) * 11 + (9,)),
    "128 x 64": dict(batch=1, heads=3, q_blocks=(128,) * 3 + (77,), k_blocks=(64,) * 11 + (9,)),
    "zero-length": dict(batch=2, heads=2, q_blocks=(64, 0, 33, 128, 0), k_blocks=(0, 17, 128, 0, 64, 0)),
    "tiny blocks": dict(batch=1, heads=2, q_blocks=(16,) * 7 + (5,), k_blocks=(16,) * 9 + (3,)),
    "many tiles": dict(batch=1, heads=2, q_blocks=(64,) * 130 + (40,), k_blocks=(64,) * 40 + (48,)),
}
PLANS = ("random", "empty rows", "broadcast", "full", "none")


def check_backward(device: str, impls: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """A title and what is wrong (None: nothing) for each case. impls: of the forward."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    turns = itertools.cycle(("bshd", "bhsd", "bshd fused"))
    for seed, (dtype, head, shape, plan) in enumerate(
        itertools.product(types, (64, 96, 128, 256), SHAPES, PLANS)
    ):
        layout = next(turns)
        if (head == 256 and shape != "ragged") or (head == 96 and shape not in ("ragged", "64 x 64")):
            continue
        case = Case(dtype=dtype, head=head, shape=shape, plan=plan, layout=layout, **SHAPES[shape])
        q, k, v, blocks = make(case, device, seed)
        for impl in impls:
            bare = [x.transpose(1, 2) if layout.startswith("bshd") else x for x in (q, k, v)]
            if why_not(impl, *bare, blocks) is None:
                yield f"backward, {impl} {case.title}", _check(impl, q, k, v, blocks, layout.split()[0])
    for n_q, n_k, share in ((9, 2000, 0.1), (300, 300, 0.05), (930, 930, 0.1), (2000, 40, 0.3)):
        yield f"inverting {n_q} x {n_k}, {share:.0%} kept", _check_inverse(n_q, n_k, share, device)
    for dtype, head in itertools.product(types[:2], (64, 128)):
        yield f"backward, sinks, {dtype} D={head}", _check_sinks(dtype, head, device)
    yield "backward, peak memory", _check_memory(device)


def _gradients(impl, q, k, v, plan, layout, grad_out, grad_lse) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_trainable(*leaves, plan, layout=layout, impl=impl)
    return torch.autograd.grad((out, lse), leaves, (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))


def _pulls(q: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(q.numel())
    lse = (q.transpose(1, 2) if layout == "bshd" else q).shape[:3]
    return tuple(torch.randn(shape, generator=generator).to(q.device, t) for shape, t in
                 ((q.shape, q.dtype), (lse, torch.float32)))  # fmt: skip


def _check(impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, layout: str) -> str | None:
    known = (plan, layout, *_pulls(q, layout))
    with poisoned_memory():
        found = _gradients(impl, q, k, v, *known)
        again = _gradients(impl, q, k, v, *known)
    exact = _gradients("reference", q.double(), k.double(), v.double(), *known)
    plain = _gradients("reference", q, k, v, *known)
    for name, x, y, low, right in zip(("dq", "dk", "dv"), found, again, plain, exact, strict=True):
        if x.shape != right.shape or x.dtype != q.dtype or not bool(x.isfinite().all()):
            return f"{name} is {x.dtype} {tuple(x.shape)}, finite: {bool(x.isfinite().all())}"
        if not torch.equal(x, y):
            return f"{name} is another the second time"
        error, size = float((x.double() - right).norm()), float(right.norm())
        allowed = 2 * float((low.double() - right).norm()) + 8 * torch.finfo(torch.float32).eps * size
        if not error <= allowed:
            return f"{name}: relative error {error / size:.2e}, allowed {allowed / size:.2e}"
    return None


def _mask(n_q: int, n_k: int, share: float, device: str) -> Tensor:
    """A random block mask `[1, 3, Nq, Nk]` in which every query block reads the first and the last key block."""
    generator = torch.Generator().manual_seed(n_q + n_k)
    mask = torch.rand(1, 3, n_q, n_k, generator=generator) < share
    mask[..., [0, -1]] = True
    return mask.to(device)


def _check_inverse(n_q: int, n_k: int, share: float, device: str) -> str | None:
    plan = BlockPlan.from_mask(_mask(n_q, n_k, share, device), uniform_starts(n_q, 1), uniform_starts(n_k, 1))
    with poisoned_memory():
        found = invert_plan(plan)
    right = invert_plan(plan, impl="reference")
    if not torch.equal(found.counts, right.counts) or not torch.equal(found.items, right.items):
        return "counts or work items are wrong"
    listed = torch.arange(n_q, device=device) < right.counts[..., None]
    return None if torch.equal(found.lists[listed], right.lists[listed]) else "lists are wrong"


def _check_sinks(dtype: torch.dtype, head: int, device: str) -> str | None:
    starts = [0, *accumulate((64,) * 120 + (17,))]
    plan = BlockPlan.from_mask(_mask(121, 121, 0.04, device), starts, starts)
    if not bool((invert_plan(plan).items[..., 3] > 1).any()):
        return "no column is cut: nothing is tested"
    generator = torch.Generator().manual_seed(head)
    q, k, v = (torch.randn(1, 3, starts[-1], head, generator=generator).to(device, dtype) for _ in range(3))
    return _check("auto", q, k, v, plan, "bhsd")


def _check_memory(device: str) -> str | None:
    """What the backward holds beside its inputs and gradients, against what is declared."""
    tokens, heads, head = 32768, 12, 128
    leaves = [torch.randn(1, heads, tokens, head, device=device).bfloat16().requires_grad_() for _ in "qkv"]
    starts = uniform_starts(tokens, 64)
    known = dict(n_q_tokens=tokens, n_k_tokens=tokens, max_q_block=64, max_k_block=64)
    plan = BlockPlan.from_mask(torch.rand(1, heads, 512, 512, device=device) < 0.1, starts, starts, **known)
    spent = 0
    for _ in range(2):  # the second time everything is compiled
        out, lse = block_sparse_trainable(*leaves, plan)
        pull = torch.randn_like(out), torch.randn_like(lse)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad((out, lse), leaves, pull)
        torch.cuda.synchronize()
        spent = torch.cuda.max_memory_allocated() - before
    beyond = spent - sum(x.numel() * x.element_size() for x in gradients)
    allowed = workspace_bytes(1, heads, head, plan)
    print(
        f"peak memory, backward: {beyond / 2**20:.1f} MiB beside the gradients, declared {allowed / 2**20:.1f}"
    )
    return None if beyond <= 1.02 * allowed else f"{beyond} bytes, declared {allowed}"
