"""Fit the projection of each self-attention's linear stand-in to what dense attention gives, by least squares."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.engine import Engine
from dit_accel.errors import UsageError
from dit_accel.handle import set_processor
from dit_accel.plan import BlockPlan
from dit_accel.processor import SparseProcessor
from dit_accel.report import Tally
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.spec import SlaSpec
from dit_accel.sla.weights import LayerWeights, SlaWeights
from dit_accel.training.sla import SlaOptions
from dit_accel.trajectory import Call, Trajectory

# How strongly a projection is drawn to the identity, in parts of the mean square of what is projected; the last one is
# the identity. Linear attention gives nearly the same to all tokens of a call, so that a few calls tell little of some
# directions, and a fit that believes them is far off on other samples.
RIDGES = (*(10.0**power for power in range(-6, 4)), math.inf)


@torch.no_grad()
def fit_projections(
    transformer: nn.Module,
    samples: Iterable[Iterable[dict[str, Any]]],
    *,
    feature: str = "softmax",
    role: str = "transformer",
) -> SlaWeights:
    """Projections with which linear attention comes nearest to dense attention, layer by layer.

    For each layer `sum |W o + b - y|^2 + ridge (|W - 1|^2 + |b|^2)` is least over all tokens, heads and forwards, where
    o is linear attention to all keys and y dense attention to the same; every layer sees what it sees in the dense
    model. The ridge is, of `RIDGES`, the one with which projections fitted without a sample are nearest on it.

    Args:
        transformer: dense; as it was afterwards.
        samples: at least two, each as the arguments of forwards.
        feature: the feature map.
        role: which transformer of its pipeline this is.

    Returns:
        Weights that have every layer as a linear one.

    Raises:
        UsageError: fewer than two samples.
    """
    shape = attention_shape(transformer)
    options = SlaOptions(feature=feature, role=role)
    trajectory, seen = Trajectory(), _Seen(shape.layers, feature)
    engine = Engine(
        transformer, options.sparse(), options.method(), trajectory, Tally.of(trajectory), role, weights=seen
    )
    try:
        set_processor(transformer, SparseProcessor.of(engine))
        for runs in samples:
            seen.begin()
            for inputs in runs:
                transformer(**inputs)
    finally:
        engine.remove()
    name, layers = type(transformer).__name__, shape.layers
    spec = SlaSpec(len(layers), shape.head_size, name, role, feature=feature, linear_layers=layers)
    return SlaWeights(spec, {layer: _solve(seen.sums[layer]) for layer in layers})


@dataclass(frozen=True)
class _Sums:
    """The normal equations of one layer for the change from the identity, fp64, x being o with a 1 behind it."""

    squares: Tensor  # sum x x^T, [D + 1, D + 1]
    products: Tensor  # sum x (y - o)^T, [D + 1, D]
    aims: Tensor  # sum |y - o|^2, 0-d

    @classmethod
    def of(cls, linear: Tensor, softmax: Tensor) -> _Sums:
        """Of what both give, `[B, H, S, D]`."""
        total = None
        for row, aim in zip(linear.flatten(0, 1), softmax.flatten(0, 1), strict=True):  # a head at a time
            aim = aim.double() - row.double()
            x = torch.cat((row.double(), aim.new_ones(len(row), 1)), 1)
            own = cls(*((a.mT @ b).cpu() for a, b in ((x, x), (x, aim))), aim.square().sum().cpu())
            total = own if total is None else total + own
        assert total is not None
        return total

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.squares + other.squares, self.products + other.products, self.aims + other.aims)

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(self.squares - other.squares, self.products - other.products, self.aims - other.aims)

    def solve(self, ridge: float) -> Tensor:
        """The change, `[D + 1, D]`."""
        if ridge == math.inf:
            return torch.zeros_like(self.products)
        size = self.products.shape[1]
        strength = ridge * self.squares.diagonal()[:size].mean()
        return torch.linalg.lstsq(self.squares + strength * torch.eye(size + 1), self.products, driver="gelsd").solution

    def error(self, change: Tensor) -> Tensor:
        """`sum |y - o - change^T x|^2`, 0-d."""
        return self.aims + (change * (self.squares @ change - 2 * self.products)).sum()


def _solve(samples: list[_Sums]) -> LayerWeights:
    if len(samples) < 2:
        raise UsageError(f"projections are fitted on 2 samples or more, each tried without itself; got {len(samples)}")
    whole = functools.reduce(operator.add, samples)
    left_out = [sum(float(own.error((whole - own).solve(ridge))) for own in samples) for ridge in RIDGES]
    change = whole.solve(RIDGES[left_out.index(min(left_out))])
    size = change.shape[1]
    return LayerWeights((torch.eye(size) + change[:size].mT).float(), change[size].float())


class _Seen:
    """Weights of an engine that has every layer dense and looks at what linear attention would give beside it."""

    trains, blends, title = False, True, ""

    def __init__(self, layers: tuple[int, ...], feature: str) -> None:
        self.linear_layers, self.feature = frozenset(layers), feature
        self.sums: dict[int, list[_Sums]] = {layer: [] for layer in layers}  # of each sample
        self._begins: set[int] = set()  # layers that have seen nothing of this sample

    def begin(self) -> None:
        """Go on to another sample."""
        self._begins = set(self.linear_layers)

    def attend_linearly(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call, softmax: Tensor | None
    ) -> Tensor:
        from dit_accel.kernels.linear_attention import linear_attention

        assert softmax is not None and call.layer is not None
        linear = linear_attention(query, key, value, feature=self.feature)
        own, sums = _Sums.of(linear, softmax), self.sums[call.layer]
        if call.layer in self._begins:
            self._begins.remove(call.layer)
            sums.append(own)
        else:
            sums[-1] += own
        return softmax

    def install(self) -> None:
        """There is nothing to put in place."""

    def show(self, trained: bool, transformer: nn.Module) -> None:
        """As `install`."""

    def remove(self) -> None:
        """As `install`."""

    def bytes_held(self) -> int:
        return 0

    def bytes_working(self, query: Tensor, plan: BlockPlan | None) -> int:
        return 0  # no report is made of this
