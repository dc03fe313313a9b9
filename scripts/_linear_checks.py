"""Linear attention and its gradients at the sizes that real models have; `check_kernels.py` runs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from _kernel_cases import poisoned_memory
from torch import Tensor

from dit_accel.kernels.linear_attention import FEATURES, linear_attention
from dit_accel.plan import BlockPlan

ROOM = 2**31  # bytes of states that float64 may take
SHAPES = {
    "even": dict(batch=1, heads=4, tokens=4096, block=128),
    "ragged": dict(batch=2, heads=3, tokens=4357, block=128),
    "64 x 64": dict(batch=1, heads=2, tokens=4357, block=64),
    "long blocks": dict(batch=1, heads=2, tokens=2000, block=300),
}


def check_linear_attention(device: str) -> Iterator[tuple[str, str | None]]:
    """A title and what is wrong (None: nothing) for each case; the implementation is the one "auto" takes."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    for shape, dim, dtype, whole in itertools.product(SHAPES, (64, 128), types, (False, True)):
        for feature in FEATURES if shape == "even" else FEATURES[:1]:
            title = f"linear attention {shape} D={dim} {dtype} {feature} {'all' if whole else 'complement'}"
            yield (
                title,
                _check(**SHAPES[shape], dim=dim, dtype=dtype, whole=whole, feature=feature, device=device),
            )
    for dim, dtype in itertools.product((16, 32), types):
        title = f"linear attention ragged D={dim} {dtype} softmax complement"
        yield (
            title,
            _check(**SHAPES["ragged"], dim=dim, dtype=dtype, whole=False, feature="softmax", device=device),
        )
    if device.startswith("cuda"):
        yield "linear attention, memory", _check_memory(device)


def inputs(
    batch: int,
    heads: int,
    tokens: int,
    block: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    keep: float = 0.3,
) -> tuple[list[Tensor], BlockPlan]:
    """q, k, v and the output's gradient, `[B, H, S, D]` in memory `[B, S, H, D]`, and a plan of random blocks; the
    second query block reads everything."""
    generator = torch.Generator(device).manual_seed(tokens + dim)
    tensors = [
        torch.randn(batch, tokens, heads, dim, generator=generator, device=device).to(dtype).transpose(1, 2)
        for _ in range(4)
    ]
    starts = [*range(0, tokens, block), tokens]
    n = len(starts) - 1
    mask = torch.rand(batch, heads, n, n, generator=generator, device=device) < keep
    mask[:, :, 1] = True
    return tensors, BlockPlan.from_mask(mask, starts, starts)


def with_gradients(attend: Callable, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*given)
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


def compare(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> str | None:
    """What errs more than twice as much as plain torch in the same type does, all against float64."""
    for name, a, b, true in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=False):
        if not bool(a.isfinite().all()):
            return f"{name} is not finite"
        size = float(true.norm())
        error, allowed = (float((x.double() - true).norm()) for x in (a, b))
        allowed = 2 * allowed + 4 * torch.finfo(torch.float32).eps * size
        if not error <= allowed:
            return f"{name}: relative error {error / size:.1e}, allowed {allowed / size:.1e}"
    return None


def _check(
    batch: int,
    heads: int,
    tokens: int,
    block: int,
    dim: int,
    dtype: torch.dtype,
    whole: bool,
    feature: str,
    device: str,
) -> str | None:
    tensors, plan = inputs(batch, heads, tokens, block, dim, dtype, device)
    plan = None if whole else plan

    def run(impl: str, wide: bool = False) -> list[Tensor]:
        given = [x.double() for x in tensors] if wide else tensors
        return with_gradients(
            lambda *a: linear_attention(*a, plan, feature=feature, impl=impl, workspace=ROOM), *given
        )

    with poisoned_memory():
        found, again = run("auto"), run("auto")
    if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        return "two runs differ"
    exact = run("reference", wide=True)
    problem = compare(found, run("reference"), exact)
    if problem or feature != "softmax":
        return problem
    weight = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)).to(device) * dim**-0.5
    before = tensors[3]
    true = [exact[0] @ weight.double().T + 1 + before.double()]
    added, low = (
        linear_attention(
            *tensors[:3],
            plan,
            projection=(weight, torch.ones_like(weight[0])),
            into=before.clone(),
            impl=impl,
        )
        for impl in ("auto", "reference")
    )
    problem = compare([added], [low], true)
    return problem and f"projected and added: {problem}"


def _check_memory(device: str) -> str | None:
    """A model's layer in bfloat16: beside what it returns, a call takes no more than it was allowed."""
    tensors, plan = inputs(1, 24, 32768, 128, 128, torch.bfloat16, device, 0.05)
    allowed = 2**27
    own = sum(x.numel() * x.element_size() for x in tensors[:3])
    for what, call, returned in (
        ("forward", lambda: linear_attention(*tensors[:3], plan, workspace=allowed), own // 3),
        (
            "backward",
            lambda: with_gradients(lambda *a: linear_attention(*a, plan, workspace=allowed), *tensors),
            own + own // 3,
        ),
    ):
        call()  # what libraries keep for themselves
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        taken = torch.cuda.max_memory_allocated() - before - returned
        plans = 16 * plan.n_q * plan.n_k * 24  # the plan as a matrix, while it is made
        if taken > allowed + plans:
            return f"{what}: {taken / 2**20:.0f} MiB, allowed {(allowed + plans) / 2**20:.0f}"
    return None
