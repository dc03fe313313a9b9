"""SlaLayers: the learned projections of a transformer's sparse and linear layers, and how they join its attention."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.plan import BlockPlan
from dit_accel.sla.linear import LinearLayer, project
from dit_accel.sla.weights import LayerWeights

MIX_AT_FIRST = 4.0  # its sigmoid is 0.98: almost all of the sparse part


class SlaLayer(nn.Module):
    """What one self-attention learns. Zero at first, so that the sparse part alone comes out.

    With a mix, a learned ratio a for each head: `a O_s + (1 - a) Proj(O_l)`. The projection is then the identity at
    first and a near 1: both parts are averages of values, and so is what lies between them.

    Args:
        head_size: D.
        heads: with a mix, its heads; None: the parts are added.
        device: of its fp32 parameters.
    """

    def __init__(self, head_size: int, heads: int | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.proj_l = nn.Linear(head_size, head_size, device=device, dtype=torch.float32)
        self.mix = None
        with torch.no_grad():
            nn.init.zeros_(self.proj_l.bias)
            if heads is None:
                nn.init.zeros_(self.proj_l.weight)
            else:
                nn.init.eye_(self.proj_l.weight)
                self.mix = nn.Parameter(torch.full((heads,), MIX_AT_FIRST, device=device))

    def forward(self, sparse: Tensor, linear: Tensor, first_head: int = 0) -> Tensor:
        """Join the parts.

        Sums are in fp32 (fp64 for such parts) also under autocast, as the published ones.

        Args:
            sparse: O_s `[B, H, S, D]`; as is `linear`, O_l.
            first_head: the model's number of the first head seen here.

        Returns:
            `[B, H, S, D]`, typed like `sparse`.
        """
        projected = project(self.proj_l, linear)
        exact = projected.dtype
        if self.mix is None:
            return (sparse.to(exact) + projected).to(sparse.dtype)
        here = self.mix[first_head : first_head + sparse.shape[1]].to(exact)
        return torch.lerp(projected, sparse.to(exact), here.sigmoid()[:, None, None]).to(sparse.dtype)


class SlaLayers(nn.Module):
    """`SlaLayer`s and `LinearLayer`s by the numbers of their self-attentions.

    Args:
        layers: those numbers.
        head_size, heads, device: as `SlaLayer`.
        linear: which of them are linear attention alone.
    """

    def __init__(
        self,
        layers: Iterable[int],
        head_size: int,
        heads: int | None = None,
        device: torch.device | str | None = None,
        linear: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.by_number = nn.ModuleDict(
            {
                str(layer): LinearLayer(head_size, device) if layer in linear else SlaLayer(head_size, heads, device)
                for layer in layers
            }
        )

    @classmethod
    def of(cls, weights: dict[int, LayerWeights], linear: Collection[int] = ()) -> SlaLayers:
        """With these values, not to be trained."""
        size = len(next(iter(weights.values())).bias)
        heads = next((len(of.mix) for of in weights.values() if of.mix is not None), None)
        new = cls(weights, size, heads, linear=linear)
        new.load(weights)
        return new.requires_grad_(False)

    def load(self, weights: dict[int, LayerWeights]) -> None:
        """Take over these values; layers and shapes are the same."""
        with torch.no_grad():
            for number, of in weights.items():
                layer = self.by_number[str(number)]
                layer.proj_l.weight.copy_(of.weight)
                layer.proj_l.bias.copy_(of.bias)
                if layer.mix is not None:
                    layer.mix.copy_(of.mix)

    def values(self) -> dict[int, LayerWeights]:
        """Copies of the values, fp32 on the CPU."""

        def copied(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to("cpu", torch.float32, copy=True)

        return {
            int(number): LayerWeights(copied(layer.proj_l.weight), copied(layer.proj_l.bias), copied(layer.mix))
            for number, layer in self.by_number.items()
        }

    def add_linear(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        layer: int,
        first_head: int,
        variant: str,
        feature: str,
    ) -> Tensor:
        """Join the linear part to the sparse one.

        Args:
            out: the sparse part, `[B, H, S, D]`; as are query, key and value.
            plan: what the sparse part has read.
            layer: which self-attention this is.
            first_head: the model's number of the first head seen here.
            variant, feature: of SLA (`spec`).

        Returns:
            Like `out`, which may be written over where nothing needs its gradient.
        """
        from dit_accel.kernels.linear_attention import linear_attention

        of = self._at(layer, out.device)
        options: dict[str, Any] = {"feature": feature, "layout": "bhsd"}
        if variant == "complement":
            options |= {"plan": plan, "skipped": plan.skipped}
        tensors = (out, query, key, value, *of.parameters())
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return of(out, linear_attention(query, key, value, **options), first_head)
        with torch.no_grad():
            weight, bias = of.proj_l.weight, of.proj_l.bias
            if of.mix is not None:
                sparse = of.mix[first_head : first_head + out.shape[1]].float().sigmoid()[:, None]
                out.mul_(sparse[..., None])
                weight, bias = (1 - sparse[..., None]) * weight, (1 - sparse) * bias
            return linear_attention(query, key, value, **options, projection=(weight, bias), into=out)

    def attend_linearly(self, query: Tensor, key: Tensor, value: Tensor, layer: int, feature: str) -> Tensor:
        """What a linear layer computes, `[B, H, S, D]` like query, key and value."""
        return self._at(layer, query.device)(query, key, value, feature)

    def _at(self, layer: int, device: torch.device) -> SlaLayer | LinearLayer:
        of = self.by_number[str(layer)]
        if of.proj_l.weight.device != device:
            of.to(device)  # once: offloading and device maps show a layer's device in its first call
        return of

    def bytes_working(self, query: Tensor, plan: BlockPlan | None) -> int:
        """At most so many bytes are taken for the states of query and key blocks in a call, query `[B, H, S, D]`.

        Without a plan, in a linear layer, for all that linear attention works in.
        """
        from dit_accel.kernels.linear_attention import WORKSPACE, bytes_of_all_keys

        if plan is None:
            return bytes_of_all_keys(query)
        batch, heads, _, size = query.shape
        states = (max(plan.n_k, plan.n_q) + plan.n_q) * size * (size + 2) * 4
        return min(WORKSPACE, batch * heads * (states + plan.n_q * plan.n_k * 8))

    def bytes_held(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters())
