"""A checkpoint: everything that a fine-tuning goes on from, in one safetensors file. Nothing in it can run code.

There is no state of a random generator in it: all draws are functions of the seed and the step (see `draws`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.pipelines.staging import Stage
from dit_accel.training.ema import Average

FORMAT, VERSION = "dit_accel fine-tuning checkpoint", "1"


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    seconds: float
    losses: tuple[float, ...]  # of each step
    before: dict[str, Any] | None  # the velocity error at step 0


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: Average,
    progress: Progress,
    options: Mapping[str, Any],
) -> None:
    """Write a checkpoint; the file has its name only once it is whole.

    Args:
        parameters: those that train, by name, in the order in which the optimiser has them.
        options: those that must be equal for a run to go on.
    """
    tensors = {f"weight.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"average.{name}": value for name, value in average.values.items()}
    names = list(parameters)
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{key}.{names[number]}": torch.as_tensor(value) for key, value in state.items()}
    told = {
        "step": progress.step,
        "seconds": progress.seconds,
        "losses": progress.losses,
        "before": progress.before,
        "options": dict(options),
    }
    with Stage() as stage:
        whole = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, stage.add(path), {"format": FORMAT, "version": VERSION, "told": json.dumps(told)})


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: Average,
    options: Mapping[str, Any],
) -> Progress:
    """Take over a checkpoint's weights, average and optimiser state.

    Returns:
        How far it had come.

    Raises:
        EnvironmentProblem: a file that is missing, cut or no checkpoint.
        UsageError: a checkpoint of other options or other parameters.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise EnvironmentProblem(f"cannot read the checkpoint {path}: {error}") from None
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise EnvironmentProblem(f"{path} is no checkpoint of a fine-tuning, version {VERSION}")
    told = json.loads(metadata["told"])
    wanted = json.loads(json.dumps(dict(options)))
    for key in {**told["options"], **wanted}:  # an option that it does not know yet is another option
        held, asked = told["options"].get(key), wanted.get(key)
        if held != asked:
            raise UsageError(
                f"{path} is of a run with {key} = {held!r}, and {asked!r} is asked for now; go on with the same "
                "options, or start anew in another folder"
            )
    _take_over(path, tensors, parameters, optimiser, average)
    return Progress(told["step"], told["seconds"], tuple(told["losses"]), told["before"])


@torch.no_grad()
def _take_over(
    path: Path,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: Average,
) -> None:
    for name, parameter in parameters.items():
        held = tensors.get(f"weight.{name}")
        if held is None or held.shape != parameter.shape:
            shape = None if held is None else tuple(held.shape)
            raise UsageError(
                f"{path} has {name} with shape {shape}, and here it is {tuple(parameter.shape)}; it is of another model"
            )
        parameter.copy_(held)
    average.load({name: tensors[f"average.{name}"] for name in parameters})
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        part, _, owner = rest.partition(".")
        if kind == "optimiser" and owner in numbers:
            state.setdefault(numbers[owner], {})[part] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
