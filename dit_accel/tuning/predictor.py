"""Predictor: how made-up steps follow from computed ones, in the words of the `latent` cache. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Predictor:
    """A polynomial through the latest computed velocities, over the "noise" level or the number of the "step"."""

    order: int = 0
    over: str = "step"


HOLD = Predictor()
PREDICTORS = (HOLD, *(Predictor(order, over) for order in (1, 2) for over in ("step", "noise")))


def coefficients(
    predictor: Predictor, computed: np.ndarray, noise: np.ndarray, begins: np.ndarray
) -> np.ndarray:
    """Of which computed steps a step's velocity is made, and with what weights.

    Args:
        computed: bool `[M, n]`, of M schedules; where a transformer begins, a step is computed.
        noise: `[n]` level of each step.
        begins: int `[n]` the first step of the transformer that runs a step: nothing is known of those before.

    Returns:
        `[M, n, n]`; row s has the weights of step s, 1 at s itself where it is computed.
    """
    many, n = computed.shape
    steps = np.arange(n)
    places = -noise if predictor.over == "noise" else steps.astype(float)
    latest = np.maximum.accumulate(np.where(computed, steps, 0), 1)  # [M, n]
    rows = np.arange(many)[:, None]
    nodes = [latest]
    for _ in range(predictor.order):
        before = nodes[-1] - 1
        found = latest[rows, np.maximum(before, 0)]
        # none before the transformer began: the node repeats itself, and lowers the order
        nodes.append(np.where(before >= begins, found, nodes[-1]))
    real = [np.ones_like(computed), *(one != before for one, before in zip(nodes[1:], nodes, strict=False))]
    weights = []
    for i, node in enumerate(nodes):
        weight = np.ones((many, n)) * real[i]
        for j, other in enumerate(nodes):
            apart = places[node] - places[other]
            counts = real[j] & (apart != 0)
            weight = weight * np.where(counts, (places - places[other]) / np.where(counts, apart, 1.0), 1.0)
        weights.append(np.where(computed, float(i == 0), weight))
    made = np.zeros((many, n, n))
    for node, weight in zip(nodes, weights, strict=True):
        np.add.at(made, (rows, steps, node), weight)
    return made
