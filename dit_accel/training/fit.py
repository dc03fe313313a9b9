"""Fit the projection of each self-attention's linear stand-in to what dense attention gives, by least squares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.engine import Engine
from dit_accel.handle import set_processor
from dit_accel.plan import BlockPlan
from dit_accel.processor import SparseProcessor
from dit_accel.report import Tally
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.spec import SlaSpec
from dit_accel.sla.weights import LayerWeights, SlaWeights
from dit_accel.training.sla import SlaOptions
from dit_accel.trajectory import Call, Trajectory

# of the mean square of what is projected. It matters where that spans fewer than D directions: what the fit cannot know
# stays the identity.
RIDGE = 1e-6


@torch.no_grad()
def fit_projections(
    transformer: nn.Module,
    runs: Iterable[dict[str, Any]],
    *,
    feature: str = "softmax",
    role: str = "transformer",
) -> SlaWeights:
    """Projections with which linear attention comes nearest to dense attention, layer by layer.

    For each layer `sum |W o + b - y|^2` is least over all tokens, heads and runs, where o is linear attention to all
    keys and y dense attention to the same; every layer sees what it sees in the dense model.

    Args:
        transformer: dense; as it was afterwards.
        runs: arguments of its forwards.
        feature: the feature map.
        role: which transformer of its pipeline this is.

    Returns:
        Weights that have every layer as a linear one.
    """
    shape = attention_shape(transformer)
    options = SlaOptions(feature=feature, role=role)
    trajectory, seen = Trajectory(), _Seen(shape.layers, shape.head_size, feature)
    engine = Engine(
        transformer, options.sparse(), options.method(), trajectory, Tally.of(trajectory), role, weights=seen
    )
    try:
        set_processor(transformer, SparseProcessor.of(engine))
        for inputs in runs:
            transformer(**inputs)
    finally:
        engine.remove()
    name, layers = type(transformer).__name__, shape.layers
    spec = SlaSpec(len(layers), shape.head_size, name, role, feature=feature, linear_layers=layers)
    return SlaWeights(spec, {layer: seen.projections[layer].solve() for layer in layers})


class _Projection:
    """The normal equations of one layer, fp64: of the change from the identity, so that a ridge draws towards it."""

    def __init__(self, head_size: int) -> None:
        self.squares = torch.zeros(head_size + 1, head_size + 1, dtype=torch.float64)
        self.products = torch.zeros(head_size + 1, head_size, dtype=torch.float64)

    def see(self, linear: Tensor, softmax: Tensor) -> None:
        """Take in what both give, `[B, H, S, D]`."""
        for row, aim in zip(linear.flatten(0, 1), softmax.flatten(0, 1), strict=True):  # a head at a time
            row, aim = row.double(), aim.double()
            with_one = torch.cat((row, row.new_ones(len(row), 1)), 1)
            self.squares += (with_one.mT @ with_one).cpu()
            self.products += (with_one.mT @ (aim - row)).cpu()

    def solve(self) -> LayerWeights:
        size = self.products.shape[1]
        ridge = torch.zeros(size + 1, dtype=torch.float64)
        ridge[:size] = RIDGE * self.squares.diagonal()[:size].mean() + torch.finfo(torch.float64).tiny
        change = torch.linalg.solve(self.squares + ridge.diag(), self.products)
        return LayerWeights((torch.eye(size) + change[:size].mT).float(), change[size].float())


class _Seen:
    """Weights of an engine that has every layer dense and looks at what linear attention would give beside it."""

    trains, blends, title = False, True, ""

    def __init__(self, layers: tuple[int, ...], head_size: int, feature: str) -> None:
        self.linear_layers, self.feature = frozenset(layers), feature
        self.projections = {layer: _Projection(head_size) for layer in layers}

    def attend_linearly(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call, softmax: Tensor | None
    ) -> Tensor:
        from dit_accel.kernels.linear_attention import linear_attention

        assert softmax is not None and call.layer is not None
        linear = linear_attention(query, key, value, feature=self.feature)
        self.projections[call.layer].see(linear, softmax)
        return softmax

    def install(self) -> None:
        """There is nothing to put in place."""

    def remove(self) -> None:
        """As `install`."""

    def bytes_held(self) -> int:
        return 0

    def bytes_working(self, query: Tensor, plan: BlockPlan | None) -> int:
        return 0  # no report is made of this
