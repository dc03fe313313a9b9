"""A moving average of the weights that train: what a fine-tuning gives out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dit_accel.errors import UsageError


class Average:
    """The average of some parameters over the steps.

    Its decay starts low and rises to `decay`, so that the first steps do not weigh for ever.

    Args:
        parameters: by name; their values now are the first average.
        decay: 0 follows them without delay.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"ema = {decay}: a number from 0 and below 1 is needed")
        self.decay = decay
        self._parameters = dict(parameters)
        self.values = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the parameters after so many steps."""
        decay = min(self.decay, steps / (steps + 10))
        now = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.values.values()), now, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters have the average's values."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(kept)

    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
