"""Which self-attentions linear attention can replace: how far the velocity is from dense when one alone is replaced."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.pipelines.staging import Stage
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.weights import SlaWeights, save_sla_weights
from dit_accel.training.draws import spread_levels
from dit_accel.training.fit import fit_projections
from dit_accel.training.samples import LatentFolder, need_samples
from dit_accel.training.sla import SlaOptions, make_trainable
from dit_accel.training.velocity import VelocityError, make_cases, measure_aims

FORMAT, VERSION = "dit_accel linear scores", "1"


@dataclass(frozen=True)
class Scores:
    """What each self-attention's replacement costs, and the projections it was measured with."""

    transformer: str  # its class
    role: str  # which transformer of its pipeline
    feature: str  # of linear attention
    errors: dict[int, VelocityError]  # by layer
    projections: SlaWeights | None  # None: none were fitted

    @property
    def ranking(self) -> tuple[int, ...]:
        """Layers, the one whose replacement costs least first; of equals the lower number."""
        return tuple(sorted(self.errors, key=lambda layer: (self.errors[layer].overall, layer)))

    def check_fits(self, transformer: nn.Module) -> None:
        """Refuse, with UsageError, a transformer of another class or with other layers."""
        name, layers = type(transformer).__name__, attention_shape(transformer).layers
        if self.transformer != name or set(self.errors) != set(layers):
            raise UsageError(
                f"These scores are of {len(self.errors)} layers of a {self.transformer}, and this is a {name} of "
                f"{len(layers)}: score this model."
            )


@torch.no_grad()
def score_layers(
    transformer: nn.Module,
    folder: LatentFolder,
    *,
    count: int,
    fit: int,
    levels: int,
    seed: int,
    feature: str = "softmax",
    role: str = "transformer",
    after: Callable[[], None] = lambda: None,
) -> Scores:
    """Replace one self-attention after the other by linear attention, all others dense.

    Args:
        transformer: dense; as it was afterwards.
        folder: latents of a model of the same class.
        count: the folder's last samples are scored, so many.
        fit: on so many samples before those, 2 or more, each layer's projection is fitted (`fit_projections`); 0: it is
            the identity.
        levels: how many noise levels of the folder's schedule.
        seed: of the noise.
        feature: the feature map.
        role: which transformer of its pipeline this is.
        after: called behind each layer.

    Raises:
        UsageError: latents of another model's class, or a number of samples or levels that cannot be.
        DitAccelError: too few samples.
    """
    name = type(transformer).__name__
    if folder.index.transformer != name:
        raise UsageError(
            f"{folder.folder} holds latents of a {folder.index.transformer}, and this is a {name}; make latents with "
            "this model"
        )
    for what, value, least in (("count", count, 1), ("fit", fit, 0), ("levels", levels, 1)):
        if value < least:
            raise UsageError(f"{what} = {value}: at least {least} is needed")
    if fit == 1:
        raise UsageError("fit = 1: 2 samples or more are needed, each tried without itself; or 0, to fit none")
    need_samples(folder, count + fit, f"scoring {count} with projections fitted on {fit} others")
    device, chosen = next(transformer.parameters()).device, spread_levels(folder.index.part(role), levels)
    told = dict(device=device, dtype=transformer.dtype, seed=seed)
    last = len(folder) - count

    def cases() -> Any:
        return make_cases(folder, range(last, len(folder)), chosen, **told)

    def velocity(inputs: dict[str, Any]) -> torch.Tensor:
        return transformer(**inputs)[0]

    projections = None
    if fit:
        samples = (
            [case.inputs for case in make_cases(folder, [place], chosen, **told)] for place in range(last - fit, last)
        )
        projections = fit_projections(transformer, samples, feature=feature, role=role)
    aims = [velocity(case.inputs).cpu() for case in cases()]
    layers, errors = attention_shape(transformer).layers, {}
    for layer in layers:
        others = tuple(other for other in layers if other != layer)
        options = SlaOptions(feature=feature, linear_layers=(layer,), dense_layers=others, role=role)
        replaced = make_trainable(transformer, options)
        try:
            if projections is not None:
                replaced.load_linear(projections)
            errors[layer] = measure_aims(cases(), velocity, aims, chosen, device=device)
        finally:
            replaced.remove()
        after()
    return Scores(name, role, feature, errors, projections)


def check_name(path: Path) -> None:
    """Refuse a name for a record, with UsageError, that does not end in .json."""
    if path.suffix != ".json":
        raise UsageError(f"{path} must end in .json; the projections stand beside it, ending in .safetensors")


def write_scores(path: Path, scores: Scores, told: dict[str, Any]) -> None:
    """Write a record and, beside it, the projections as a side file that has every layer as a linear one.

    Args:
        path: of the record, ending in .json.
        told: what else it shall say.

    Raises:
        UsageError: a name that does not end in .json.
    """
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if scores.projections is not None:
        save_sla_weights(path.with_suffix(".safetensors"), scores.projections)
    record = {
        "format": FORMAT,
        "version": VERSION,
        **told,
        "transformer": scores.transformer,
        "role": scores.role,
        "feature": scores.feature,
        "fitted": scores.projections is not None,
        "layers": [{"layer": layer, "error": scores.errors[layer].to_dict()} for layer in scores.ranking],
    }
    with Stage() as stage:
        stage.write_text(path, json.dumps(record, indent=1) + "\n")


def read_scores(path: Path) -> Scores:
    """Read what `write_scores` wrote.

    Raises:
        EnvironmentProblem: a file that is missing or no such record, or projections that are missing.
    """
    from dit_accel.sla.weights import load_sla_weights

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"cannot read the scores {path}: {error}") from None
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise EnvironmentProblem(f"{path} is no record of `finetune_sla.py score`, version {VERSION}; make one")
    errors = {
        each["layer"]: VelocityError(
            tuple((level["sigma"], level["error"]) for level in each["error"]["levels"]), each["error"]["overall"]
        )
        for each in record["layers"]
    }
    projections = load_sla_weights(path.with_suffix(".safetensors")) if record["fitted"] else None
    return Scores(record["transformer"], record["role"], record["feature"], errors, projections)


def best_layers(scores: Scores, count: int, leave_out: Collection[int] = ()) -> tuple[int, ...]:
    """The layers whose replacement costs least, ascending.

    Args:
        count: how many.
        leave_out: those that stay dense; negative ones count from the last.

    Raises:
        UsageError: there are not so many, or none is asked for.
    """
    dense = {layer % len(scores.errors) for layer in leave_out}
    found = [layer for layer in scores.ranking if layer not in dense]
    if not 1 <= count <= len(found):
        raise UsageError(f"best:{count} is not possible: 1 to {len(found)} layers can be chosen")
    return tuple(sorted(found[:count]))
