"""ChangedTensors: a transformer's parameters as training left them, put in place of its own and taken out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit_accel.errors import UsageError
from dit_accel.sla.weights import SlaWeights

Value = Tensor | tuple[Tensor, Tensor]  # whole, or (up, down) to be added
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


class ChangedTensors:
    """What a side file changes of a transformer. Constructing touches nothing.

    The parameters stay the same objects; what they hold is swapped. What they held before is kept on the CPU, and
    comes back bit for bit.

    Args:
        transformer: whose parameters.
        weights: holds the new values.

    Raises:
        UsageError: a name or a shape that the transformer does not have, or parameters that hold no numbers to change:
            quantised ones, and those that offloading has moved away.
    """

    def __init__(self, transformer: nn.Module, weights: SlaWeights) -> None:
        self._new: dict[str, tuple[nn.Parameter, Value]] = {}
        self._own: dict[str, Tensor] = {}  # what they held before, once the new values were put
        self._marks: dict[str, tuple[torch.dtype, int]] = {}  # of what was put there last
        self._trained: bool | None = False  # whether they hold the new values; None: a swap was interrupted
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
            self._new[name] = parameter, value

    def put(self) -> None:
        """Put the new values in place. Nothing the second time."""
        if not self._own:
            for name, (parameter, _) in self._new.items():
                self._own[name] = parameter.data.to("cpu", copy=True)
            try:
                self._write(trained=True)
            except BaseException:
                self.take_back()
                raise

    def show(self, trained: bool, transformer: nn.Module) -> None:
        """Have the parameters hold the new values, or what they held before, once `put` was called.

        Args:
            transformer: which has them.

        Raises:
            UsageError: parameters that were replaced, fused or changed since they were put. Nothing has
                been changed then.
        """
        if self._own and trained is not self._trained:
            self._check_ours(transformer)
            self._write(trained)

    def take_back(self) -> None:
        """Give every parameter back what it held, wherever it is now. Nothing the second time."""
        if self._own:
            self._write(trained=False)
        self._own = {}

    def _write(self, trained: bool) -> None:
        """In place: what holds the parameters' addresses (CUDA graphs, group offloading) goes on with them."""
        self._trained = None
        for name, (parameter, value) in self._new.items():
            held = self._own[name]
            if trained:
                held = _learnt(held.to(parameter.device), value)
            parameter.data.copy_(held)
            self._marks[name] = _mark(parameter)
        self._trained = trained

    def bytes_held(self) -> int:
        return sum(held.numel() * held.element_size() for held in self._own.values())

    def _check_ours(self, transformer: nn.Module) -> None:
        """Raise where writing to the parameters would be in vain, or would undo what somebody else did to them."""
        parameters = dict(transformer.named_parameters())
        fused = any(getattr(module, "fused_projections", False) for module in transformer.modules())
        for name, (parameter, _) in self._new.items():
            dtype, bits = self._marks[name]
            if fused or find_parameter(parameters, name) is not parameter:
                what = "were fused or replaced"  # sequential offloading puts others in their place, too
            elif self._trained is not None and parameter.dtype == dtype and _mark(parameter)[1] != bits:
                what = "were changed"
            else:
                continue
            raise UsageError(
                f"Weights that these SLA weights train, as {name!r}, {what} after installation, and dense steps need "
                "those from before: call remove(), make the change, and install again (offload by model or by group; "
                "do not fuse projections), or leave no step dense (dense_above=1)."
            )


def find_parameter(parameters: dict[str, nn.Parameter], name: str) -> nn.Parameter | None:
    """By its name in the plain model, also where an adapter of PEFT is wrapped around its module."""
    path, _, last = name.rpartition(".")
    return parameters.get(name, parameters.get(f"{path}.base_layer.{last}"))


def _learnt(own: Tensor, value: Value) -> Tensor:
    """A new value in the type and on the device of the old one: the same numbers each time."""
    if isinstance(value, tuple):
        up, down = (x.to(own.device, torch.float32) for x in value)
        value = own.float() + up @ down
    return value.to(own.device, own.dtype)


def _mark(parameter: nn.Parameter) -> tuple[torch.dtype, int]:
    """Type and sum of all bits as integers: the same on every device, and another for nearly every other content."""
    held = parameter.data.contiguous()
    return held.dtype, int(held.view(_BITS[held.element_size()]).sum(dtype=torch.int64))
