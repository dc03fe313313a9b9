"""Trained: SLA's weights on one transformer, as an engine holds them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from dit_accel.plan import BlockPlan
from dit_accel.sla.changed import ChangedTensors
from dit_accel.sla.layers import SlaLayers
from dit_accel.sla.weights import SlaWeights


class Trained:
    """The weights of a side file for one transformer. Constructing touches nothing.

    Args:
        weights: the file's.
        transformer: they are for.
        attentions: its self-attentions that are to be sparse, by number.
        title: what the report calls the linear part.

    Raises:
        UsageError: weights that do not fit the transformer.
    """

    trains = False

    def __init__(
        self, weights: SlaWeights, transformer: nn.Module, attentions: dict[int, nn.Module], title: str
    ) -> None:
        weights.check_fits(transformer, attentions, *head_shape(attentions))
        self.title = title
        self.layers = SlaLayers.of({layer: weights.layers[layer] for layer in attentions})
        self._changed = ChangedTensors(transformer, weights)

    def install(self) -> None:
        """Swap in what training changed of the transformer."""
        self._changed.put()

    def remove(self) -> None:
        """Give the transformer back what it was. Nothing the second time."""
        self._changed.take_back()

    def bytes_working(self, query: Tensor, plan: BlockPlan) -> int:
        return self.layers.bytes_working(query, plan)

    def bytes_held(self) -> int:
        return self.layers.bytes_held() + self._changed.bytes_held()


def head_shape(attentions: dict[int, Any]) -> tuple[int, int]:
    """Heads, and the size of each, of a transformer's self-attentions."""
    attention = next(iter(attentions.values()))
    return attention.heads, attention.inner_dim // attention.heads


def sparse_only(attentions: dict[int, nn.Module], dense_layers: Collection[int]) -> dict[int, nn.Module]:
    """Those that are no dense layers."""
    return {layer: attention for layer, attention in attentions.items() if layer not in dense_layers}
