"""Trained: SLA's weights on one transformer, as an engine holds them."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from dit_accel.errors import UsageError
from dit_accel.plan import BlockPlan
from dit_accel.sla.changed import ChangedTensors
from dit_accel.sla.layers import SlaLayers
from dit_accel.sla.weights import SlaWeights
from dit_accel.trajectory import Call


class Trained:
    """The weights of a side file for one transformer. Constructing touches nothing.

    Args:
        weights: the file's.
        transformer: they are for.
        layers: its self-attentions that are not to stay dense.
        title: what the report calls the linear part.

    Raises:
        UsageError: weights that do not fit the transformer, or a linear layer of theirs that is to stay dense.
    """

    trains = blends = False

    def __init__(
        self, weights: SlaWeights, transformer: nn.Module, layers: Collection[int], title: str
    ) -> None:
        weights.check_fits(transformer, layers)
        both = sorted(set(weights.spec.linear_layers) - set(layers))
        if both:
            raise UsageError(
                f"dense_layers names layer {', '.join(map(str, both))}, which these SLA weights were trained to have "
                "linear: leave it out of dense_layers."
            )
        self.title, self.feature = title, weights.spec.feature
        self.linear_layers = frozenset(weights.spec.linear_layers)
        self.layers = SlaLayers.of({layer: weights.layers[layer] for layer in layers}, self.linear_layers)
        self._changed = ChangedTensors(transformer, weights)

    def install(self) -> None:
        """Swap in what training changed of the transformer."""
        self._changed.put()

    def show(self, trained: bool, transformer: nn.Module) -> None:
        """What training changed, or the transformer's own: it learnt nothing for forwards that are dense."""
        self._changed.show(trained, transformer)

    def remove(self) -> None:
        """Give the transformer back what it was. Nothing the second time."""
        self._changed.take_back()

    def attend_linearly(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call, softmax: Tensor | None
    ) -> Tensor:
        """A linear layer's output; nothing is blended with it."""
        return self.layers.attend_linearly(query, key, value, call.layer, self.feature)

    def bytes_working(self, query: Tensor, plan: BlockPlan | None) -> int:
        return self.layers.bytes_working(query, plan)

    def bytes_held(self) -> int:
        return self.layers.bytes_held() + self._changed.bytes_held()
