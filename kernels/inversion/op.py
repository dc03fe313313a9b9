"""Inversion as one opaque node of torch.compile: `torch.ops.dit_accel.invert_lists`."""

from __future__ import annotations

import torch
from torch import Tensor

from .api import run
from .inverse import FIELDS, bounds


@torch.library.custom_op("dit_accel::invert_lists", mutates_args=())
def invert_lists_op(counts: Tensor, indices: Tensor, n_k: int, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """As `api.run`."""
    return run(counts, indices, n_k, impl)


@invert_lists_op.register_fake
def _shapes(counts, indices, n_k, impl):
    batch, heads, n_q = counts.shape
    items, _ = bounds(n_q, n_k)
    shapes = (batch, heads, n_k), (batch, heads, n_k, n_q), (batch, heads, items, FIELDS)
    return tuple(counts.new_empty(shape) for shape in shapes)


def invert_lists(counts: Tensor, indices: Tensor, n_k: int, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """`api.run` through the operator."""
    return invert_lists_op(counts, indices, n_k, impl)
