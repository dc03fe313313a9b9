"""Trained: SLA's weights on one transformer, as an engine holds them."""

from __future__ import annotations

from collections.abc import Collection

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
        layers: its self-attentions that are to be sparse.
        title: what the report calls the linear part.

    Raises:
        UsageError: weights that do not fit the transformer.
    """

    trains = False

    def __init__(
        self, weights: SlaWeights, transformer: nn.Module, layers: Collection[int], title: str
    ) -> None:
        weights.check_fits(transformer, layers)
        self.title = title
        self.layers = SlaLayers.of({layer: weights.layers[layer] for layer in layers})
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
