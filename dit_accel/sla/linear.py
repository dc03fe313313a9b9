"""LinearLayer: a self-attention that is linear attention alone, and the projection behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearLayer(nn.Module):
    """`Proj(O_l)` in place of a self-attention, O_l being linear attention to all keys: no plan, nothing read exactly.

    The projection is the identity at first: O_l is an average of values, as what it stands for is.

    Args:
        head_size: D.
        device: of its fp32 parameters.

    Source: layers replaced one by one, LinVideo (arXiv:2510.08318) and Attention Surgery (arXiv:2509.24899); the
    feature maps and the projection are SLA's (arXiv:2509.24006), not theirs.
    """

    mix = None  # there is no other part

    def __init__(self, head_size: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.proj_l = nn.Linear(head_size, head_size, device=device, dtype=torch.float32)
        with torch.no_grad():
            nn.init.eye_(self.proj_l.weight)
            nn.init.zeros_(self.proj_l.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, feature: str) -> Tensor:
        """Attend.

        Args:
            query: `[B, H, S, D]`; key and value the same with their own S.
            feature: a name of `kernels.linear_attention.FEATURES`.

        Returns:
            Shaped and typed like `query`.
        """
        from dit_accel.kernels.linear_attention import linear_attention

        options = {"feature": feature, "layout": "bhsd"}
        weight, bias = self.proj_l.weight, self.proj_l.bias
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, weight, bias)):
            return project(self.proj_l, linear_attention(query, key, value, **options)).to(query.dtype)
        with torch.no_grad():
            return linear_attention(query, key, value, **options, projection=(weight, bias))


def project(proj: nn.Linear, x: Tensor) -> Tensor:
    """A projection in fp32, or fp64 for such an x, also under autocast."""
    exact = torch.promote_types(torch.promote_types(x.dtype, proj.weight.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(exact), proj.weight.to(exact), proj.bias.to(exact))
