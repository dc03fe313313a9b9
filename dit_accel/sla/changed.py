"""ChangedTensors: a transformer's parameters as training left them, put in place of its own and taken out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit_accel.errors import UsageError
from dit_accel.sla.weights import SlaWeights


class ChangedTensors:
    """What a side file changes of a transformer. Constructing touches nothing.

    The parameters stay the same objects; what they hold is swapped. What they held before is kept, on the CPU where
    the transformer is on an accelerator, and comes back bit for bit.

    Args:
        transformer: whose parameters.
        weights: holds the new values.

    Raises:
        UsageError: a name or a shape that the transformer does not have, or parameters that hold no numbers to change:
            quantised ones, and those that offloading has moved away.
    """

    def __init__(self, transformer: nn.Module, weights: SlaWeights) -> None:
        self._new: list[tuple[nn.Parameter, Tensor | tuple[Tensor, Tensor]]] = []
        self._old: list[tuple[nn.Parameter, Tensor]] = []
        parameters = dict(transformer.named_parameters())
        for name, value in (*weights.tensors.items(), *weights.lora.items()):
            parameter = find_parameter(parameters, name)
            if parameter is None:
                raise UsageError(
                    f"The side file changes {name!r}, which this {type(transformer).__name__} does not have: give the "
                    "file of this model, and install it before its parts are fused."
                )
            shape = (len(value[0]), value[1].shape[1]) if isinstance(value, tuple) else value.shape
            if not parameter.is_floating_point() or parameter.is_meta:
                what = "on no device (offloaded)" if parameter.is_meta else f"{parameter.dtype} (quantised)"
                raise UsageError(
                    f"The side file changes {name!r}, which is {what} here: install it before that, on the plain model."
                )
            if parameter.shape != torch.Size(shape):
                raise UsageError(
                    f"The side file has {name!r} of shape {tuple(shape)}, and this {type(transformer).__name__} of "
                    f"{tuple(parameter.shape)}: give the file of this model."
                )
            self._new.append((parameter, value))

    def put(self) -> None:
        """Put the new values in place. The second time there is nothing left to put."""
        new, self._new = self._new, []
        for parameter, value in new:
            held = parameter.data
            if isinstance(value, tuple):
                up, down = (x.to(held.device, torch.float32) for x in value)
                value = held.float() + up @ down
            parameter.data = value.to(held.device, held.dtype, copy=True)
            self._old.append((parameter, held.cpu()))

    def take_back(self) -> None:
        """Give every parameter back what it held, wherever it is now. Nothing the second time."""
        while self._old:
            parameter, held = self._old.pop()
            parameter.data = held.to(parameter.device, parameter.dtype)

    def bytes_held(self) -> int:
        return sum(held.numel() * held.element_size() for _, held in self._old)


def find_parameter(parameters: dict[str, nn.Parameter], name: str) -> nn.Parameter | None:
    """By its name in the plain model, also where an adapter of PEFT is wrapped around its module."""
    path, _, last = name.rpartition(".")
    return parameters.get(name, parameters.get(f"{path}.base_layer.{last}"))
