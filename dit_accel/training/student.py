"""A student with its dense teacher: one transformer with SLA, and what of it trains."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.adapters import find_adapter
from dit_accel.errors import EnvironmentProblem, UsageError, unknown_name
from dit_accel.sla.weights import SlaWeights
from dit_accel.training.sla import SlaOptions, TrainableSla, make_trainable

TRAINS = ("full", "lora", "projection")
_ADAPTER = "sla"  # of PEFT


class Student(nn.Module):
    """A transformer with SLA. Called with the transformer's arguments it gives the velocity, as `teacher` does densely.

    The teacher is the same weights without SLA where these stay as they are (LoRA switched off); a frozen copy where
    everything trains.

    Args:
        transformer: of a family that `make_trainable` takes; its weights are frozen unless everything trains, which
            brings them to fp32.
        options: of SLA.
        trains: "full" (projections and the whole transformer), "lora" (projections and a LoRA of the self-attentions
            that do not stay dense) or "projection" (projections alone).
        rank: of the LoRA.

    Raises:
        UnknownNameError: `trains` is none of these.
        EnvironmentProblem: a LoRA without PEFT.
    """

    def __init__(self, transformer: nn.Module, options: SlaOptions, trains: str = "lora", rank: int = 32) -> None:
        super().__init__()
        if trains not in TRAINS:
            raise unknown_name("choice of what trains", trains, TRAINS)
        self.trains = trains
        # in a tuple it is no child of this module: neither wrapped nor counted among its parameters
        self._frozen: tuple[nn.Module, ...] = ()
        transformer.requires_grad_(False)
        if trains == "full":
            self._frozen = (copy.deepcopy(transformer),)
            if transformer.dtype != torch.float32:
                transformer.float()
            transformer.requires_grad_(True)
        elif trains == "lora":
            _add_lora(transformer, rank, options.dense_layers)
        self.sla: TrainableSla = make_trainable(transformer, options)

    @property
    def transformer(self) -> nn.Module:
        return self.sla.transformer

    def start_from(self, weights: SlaWeights) -> None:
        """Take over trained weights. Without a teacher of its own, changed weights of the transformer would be it.

        Raises:
            UsageError: weights that are not for this student.
        """
        if (weights.tensors or weights.lora) and self.trains != "full":
            raise UsageError(
                "These weights change the transformer too, which is the dense teacher where only "
                f"{self.trains!r} trains: start from weights of projections alone, or train 'full'."
            )
        self.sla.load(weights)

    def start_linear_from(self, weights: SlaWeights) -> None:
        """Take over the projections of the linear layers alone.

        Raises:
            UsageError: weights that are not for this student, or have not all of these layers as linear ones.
        """
        self.sla.load_linear(weights)

    def forward(self, **inputs: Any) -> Tensor:
        """The velocity with SLA."""
        return self.sla(**inputs)[0]

    @torch.no_grad()
    def teacher(self, **inputs: Any) -> Tensor:
        """The velocity of the dense model."""
        if self._frozen:
            return self._frozen[0](**inputs)[0]
        with self.sla.dense(), self._without_lora():
            return self.sla(**inputs)[0]

    def place(self, device: torch.device) -> None:
        """Bring student and teacher to a device."""
        for module in (self, *self._frozen):
            module.to(device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def _without_lora(self) -> Iterator[None]:
        if self.trains != "lora":
            yield
            return
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()


def lora_targets(transformer: nn.Module, dense_layers: Collection[int] = ()) -> list[str]:
    """Paths of the linear layers inside the self-attentions, those of dense layers left out."""
    attentions = find_adapter(transformer).self_attentions(transformer)
    dense = {layer % len(attentions) for layer in dense_layers}
    paths = []
    for path, layer in attentions:
        if layer not in dense:
            named = transformer.get_submodule(path).named_modules()
            paths += [f"{path}.{name}" for name, module in named if isinstance(module, nn.Linear)]
    return paths


def _add_lora(transformer: nn.Module, rank: int, dense_layers: Collection[int]) -> None:
    try:
        from peft import LoraConfig
    except ImportError:
        raise EnvironmentProblem(
            "a LoRA needs peft: pip install 'dit-accel[training]', or train 'projection' or 'full'"
        ) from None
    if rank < 1:
        raise UsageError(f"LoRA of rank {rank}: at least 1 is needed")
    targets = lora_targets(transformer, dense_layers)
    # alpha = rank: what is added is up @ down
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # equal in every process, and in a run that is gone on with
        transformer.add_adapter(config, adapter_name=_ADAPTER)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
