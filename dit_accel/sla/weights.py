"""SlaWeights: what training SLA leaves behind, as a value; saved to a side file and loaded from one (see `spec`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_accel.errors import EnvironmentProblem, UsageError
from dit_accel.sla.shape import attention_shape
from dit_accel.sla.spec import FORMAT, PUBLISHED, SlaSpec, file_for, read_head, read_spec

logger = logging.getLogger("dit_accel")


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Of one self-attention: the projection of its linear part, and how the parts are mixed."""

    weight: Tensor  # [D, D]
    bias: Tensor  # [D]
    mix: Tensor | None = None  # [H], a logit for each head; None: the parts are added, or the layer is linear


@dataclass(frozen=True, eq=False)
class SlaWeights:
    """Projections of the layers that were trained, and what else of the transformer training changed.

    Raises:
        UsageError: a tensor whose shape is not as described, or a layer that the transformer does not have.
    """

    spec: SlaSpec
    layers: dict[int, LayerWeights]
    tensors: dict[str, Tensor] = field(default_factory=dict)  # the transformer's parameters by name, in its shapes
    lora: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (up [out, r], down [r, in]) to be added

    def __post_init__(self) -> None:
        size = self.spec.head_size
        for layer, of in self.layers.items():
            if not 0 <= layer < self.spec.n_layers:
                raise UsageError(f"SLA weights name layer {layer}, of a transformer of {self.spec.n_layers} layers.")
            for name, shape in (("weight", (size, size)), ("bias", (size,))):
                given = tuple(getattr(of, name).shape)
                if given != shape:
                    raise UsageError(f"layers.{layer}.proj_l.{name} must be {shape} for head size {size}, got {given}.")
            if of.mix is not None and of.mix.dim() != 1:
                raise UsageError(f"layers.{layer}.mix must be [heads], got {tuple(of.mix.shape)}.")
        linear = set(self.spec.linear_layers)
        if any(of.mix is not None for layer, of in self.layers.items() if layer in linear):
            raise UsageError("SLA weights have no mix in linear layers, which have one part alone.")
        sparse = [of for layer, of in self.layers.items() if layer not in linear]
        if len({None if of.mix is None else of.mix.shape for of in sparse}) > 1:
            raise UsageError("SLA weights must have a mix of equal size in every sparse layer, or in none.")
        missing = sorted(linear - set(self.layers))
        if missing:
            raise UsageError(f"SLA weights say that layer {missing[0]} is linear, and have no projection of it.")
        for name, (up, down) in self.lora.items():
            if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
                raise UsageError(
                    f"lora.{name} must be up [out, r] and down [r, in], got {tuple(up.shape)} and {tuple(down.shape)}."
                )

    def check_fits(self, transformer: nn.Module, needed: Collection[int]) -> None:
        """Refuse a transformer that these weights are not for.

        Args:
            needed: its layers that are not to stay dense.

        Raises:
            UsageError: another class, another size, or a layer without weights.
        """
        spec, name, shape = self.spec, type(transformer).__name__, attention_shape(transformer)
        if spec.transformer not in (None, name):
            raise UsageError(
                f"These SLA weights were trained on a {spec.transformer}, and this is a {name}: give that model's."
            )
        ours, theirs = (len(shape.layers), shape.head_size), (spec.n_layers, spec.head_size)
        if ours != theirs:
            raise UsageError(
                f"These SLA weights are for {theirs[0]} layers with heads of {theirs[1]}, and this {name} has "
                f"{ours[0]} with heads of {ours[1]}: give those of this model's size."
            )
        missing = sorted(set(needed) - set(self.layers))
        if missing:
            raise UsageError(
                f"These SLA weights have no layer {', '.join(map(str, missing))}: add what is missing to dense_layers, "
                "or give weights of all layers."
            )
        for layer, of in self.layers.items():
            if of.mix is not None and len(of.mix) != shape.heads:
                raise UsageError(f"layers.{layer}.mix is for {len(of.mix)} heads, and this {name} has {shape.heads}.")


def save_sla_weights(path: str | Path, weights: SlaWeights) -> None:
    """Write a side file; it appears whole or not at all.

    Projections and mixes are written in fp32, all else as it is.
    """
    tensors: dict[str, Tensor] = {}
    for layer, of in sorted(weights.layers.items()):
        tensors[f"layers.{layer}.proj_l.weight"], tensors[f"layers.{layer}.proj_l.bias"] = of.weight, of.bias
        if of.mix is not None:
            tensors[f"layers.{layer}.mix"] = of.mix
    tensors = {name: x.float() for name, x in tensors.items()}
    tensors |= {f"transformer.{name}": x for name, x in weights.tensors.items()}
    for name, (up, down) in weights.lora.items():
        tensors |= {f"lora.{name}.up": up, f"lora.{name}.down": down}
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # cloned: safetensors refuses tensors that share memory
        whole = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
        save_file(whole, partial, metadata=weights.spec.to_metadata())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_sla_weights(path: str | Path) -> SlaWeights:
    """Load a side file, ours or a published one; everything on the CPU. Of a folder that of the first transformer.

    Raises:
        EnvironmentProblem: a file that is missing, unreadable, cut short or not safetensors.
        UsageError: a file that holds no weights of SLA, or some of the wrong shape.
    """
    path = file_for(path, "transformer")
    spec, metadata = read_spec(path), read_head(path).get("__metadata__", {})
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise EnvironmentProblem(f"{path} is damaged ({error}); get or train it anew.") from None
    try:
        return (_load_ours if metadata.get("format") == FORMAT else _load_published)(spec, tensors)
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from None


def _load_ours(spec: SlaSpec, tensors: dict[str, Tensor]) -> SlaWeights:
    parts: dict[int, dict[str, Tensor]] = {}
    changed: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "transformer":
            changed[rest] = x
        elif kind == "lora":
            of, _, part = rest.rpartition(".")
            pairs.setdefault(of, {})[part] = x
        elif kind == "layers" and rest.partition(".")[0].isdigit():
            layer, _, part = rest.partition(".")
            parts.setdefault(int(layer), {})[part.rpartition(".")[2]] = x
        else:
            raise UsageError(f"{name!r} is no tensor of a side file: it holds layers., transformer. and lora.")
    for name, pair in pairs.items():
        if set(pair) != {"up", "down"}:
            raise UsageError(f"lora.{name} needs .up and .down, and has {', '.join(sorted(pair))} alone.")
    return SlaWeights(
        spec, _layers_of(parts), changed, {name: (pair["up"], pair["down"]) for name, pair in pairs.items()}
    )


def _load_published(spec: SlaSpec, tensors: dict[str, Tensor]) -> SlaWeights:
    parts: dict[int, dict[str, Tensor]] = {}
    others = 0
    for name, x in tensors.items():
        match = PUBLISHED.search(name)
        if match is None:
            others += 1
            continue
        part = parts.setdefault(int(match[1]), {})
        if match[2] in part:
            raise UsageError(f"two tensors are proj_l.{match[2]} of layer {match[1]}; {name!r} is the second.")
        part[match[2]] = x
    if others:
        logger.info(
            f"{others} tensors of this published checkpoint are not proj_l and are left alone: the transformer itself "
            "must be loaded from it"
        )
    return SlaWeights(spec, _layers_of(parts))


def _layers_of(parts: dict[int, dict[str, Tensor]]) -> dict[int, LayerWeights]:
    for layer, part in parts.items():
        for name in ("weight", "bias"):
            if name not in part:
                raise UsageError(f"layer {layer} has no proj_l.{name}: every layer needs both weight and bias.")
        for name, x in part.items():
            if name not in ("weight", "bias", "mix") or not x.is_floating_point():
                raise UsageError(f"layer {layer} has a {name!r} of {x.dtype}: it takes floating weight, bias and mix.")
    return {
        layer: LayerWeights(**{name: x.to(torch.float32) for name, x in part.items()})
        for layer, part in sorted(parts.items())
    }
