"""How far two tensors are apart, for each sample of a batch."""

from __future__ import annotations

from torch import Tensor

TINY = 1e-12


def mean_size(x: Tensor) -> Tensor:
    """Mean absolute value of each sample: `[B, ...]` -> fp32 `[B]`."""
    return x.detach().float().abs().flatten(1).mean(1)


def relative_l1(x: Tensor, reference: Tensor) -> Tensor:
    """`mean|x - reference| / mean|reference|` of each sample: `[B, ...]` -> fp32 `[B]`."""
    reference = reference.detach().float()
    return mean_size(x.detach().float() - reference) / mean_size(reference).clamp_min(TINY)


def worst(errors: Tensor) -> float:
    """The largest of a batch, so that no sample hides behind another. Waits for the device."""
    return float(errors.max())
