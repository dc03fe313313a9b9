"""The shape of a transformer's self-attentions: what weights of SLA must agree with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dit_accel.adapters import find_adapter


@dataclass(frozen=True)
class AttentionShape:
    """What all self-attentions of a transformer have in common."""

    layers: tuple[int, ...]  # their numbers
    heads: int
    head_size: int


def attention_shape(transformer: nn.Module) -> AttentionShape:
    """Look at a transformer's self-attentions.

    Raises:
        UnknownModelError: a transformer of no known family.
    """
    found = list(find_adapter(transformer).self_attentions(transformer))
    attention = transformer.get_submodule(found[0][0])
    return AttentionShape(tuple(layer for _, layer in found), attention.heads, attention.inner_dim // attention.heads)
