"""Muon for many equal matrices: one batched Newton-Schulz iteration for each shape.

`torch.optim.Muon` launches some thirty kernels for every matrix; a small model of eighty matrices then waits for the
launches. The update is the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as torch.optim.Muon has them
_ROUNDS = 5


class BatchedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")` over stacks of matrices of one shape."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float | Tensor, weight_decay: float, momentum: float = 0.95
    ):
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": group} for group in by_shape.values()], defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            matrices = group["params"]
            gradient = torch.stack([m.grad for m in matrices])
            state = self.state[matrices[0]]
            speed = state.setdefault("momentum", torch.zeros_like(gradient))
            speed.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalise(gradient.lerp_(speed, group["momentum"]))
            rows, columns = matrices[0].shape
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            update = update.to(gradient.dtype) * (group["lr"] * -0.2 * max(rows, columns) ** 0.5)
            torch._foreach_add_(matrices, list(update.unbind()))


def orthogonalise(stack: Tensor) -> Tensor:
    """Bring every singular value of `[n, rows, columns]` near one; bf16, as the iteration tolerates it."""
    a, b, c = _COEFFICIENTS
    tall = stack.shape[1] > stack.shape[2]
    x = stack.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
