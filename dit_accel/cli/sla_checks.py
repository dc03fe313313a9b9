"""Small problems for the kernels of sparse-linear attention and its training, as in `kernel_checks`."""

from __future__ import annotations

import time

from dit_accel.cli.kernel_checks import Check, device_for, judge

TOKENS, STARTS = 150, [0, 64, 128, 150]
READ = [[1, 0, 0], [0, 1, 1], [1, 1, 0]]


def check_linear_attention(name: str) -> Check:
    """Over the key blocks that a plan leaves unread, against the sum over pairs of tokens in fp64."""
    import torch

    from dit_accel.kernels.linear_attention import linear_attention, why_not

    impl = name.split("/")[1]
    device = device_for(impl)
    q, k, v = _inputs(3, device)
    reason = why_not(impl, q)
    if reason is not None:
        return Check(name, "absent", reason)
    plan = _plan(device)
    began = time.perf_counter()
    out = linear_attention(q, k, v, plan, impl=impl)
    near = q.double().softmax(-1) @ k.double().softmax(-1).mT
    near = near.masked_fill(plan.to_token_mask(), 0)
    exact = near @ v.double() / (near.sum(-1, keepdim=True) + 1e-5)
    error = float((out - exact).abs().max() / exact.abs().max())
    return judge(name, torch.float32, device, error, f"relative error {error:.1e}", began)


def check_gradients(name: str) -> Check:
    """Of block-sparse attention, against masked dense attention in fp64."""
    import torch

    from dit_accel.kernels.block_sparse import block_sparse_trainable
    from dit_accel.kernels.inversion import why_not

    impl = name.split("/")[1]
    device = device_for(impl)
    inputs = [x.requires_grad_() for x in _inputs(3, device)]
    plan = _plan(device)
    reason = why_not(impl, plan.counts)
    if reason is not None:
        return Check(name, "absent", reason)
    began = time.perf_counter()
    grad = torch.linspace(-1, 1, 64, device=device)
    out, lse = block_sparse_trainable(*inputs, plan, impl=impl)
    found = torch.autograd.grad((out * grad).sum() + lse.sum(), inputs)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = exact_inputs
    scores = (q @ k.mT * 64**-0.5).masked_fill(~plan.to_token_mask(), -torch.inf)
    exact = torch.autograd.grad((scores.softmax(-1) @ v * grad).sum() + scores.logsumexp(-1).sum(), exact_inputs)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
    return judge(name, torch.float32, device, error, f"relative error {error:.1e}", began)


def _inputs(count: int, device):
    import torch

    generator = torch.Generator("cpu").manual_seed(9)
    return [torch.randn(1, 2, TOKENS, 64, generator=generator).to(device) for _ in range(count)]


def _plan(device):
    import torch

    from dit_accel.plan import BlockPlan

    return BlockPlan.from_mask(torch.tensor(READ, dtype=torch.bool, device=device)[None, None], STARTS, STARTS)
