"""Random weights from a seed, the global generator left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw what is drawn inside from a seed on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build(make: Callable[..., nn.Module], seed: int, **config: Any) -> nn.Module:
    """A model of a class and its arguments, ready for forwards without gradients."""
    with seeded(seed):
        return make(**config).eval().requires_grad_(False)
