"""SlaSpec: what the head of a side file says its weights were trained for. Importing this module imports no torch.

A side file is safetensors. Ours holds, with D the head size and H the heads,

    layers.{i}.proj_l.weight   fp32 [D, D], of self-attention i
    layers.{i}.proj_l.bias     fp32 [D]
    layers.{i}.mix             fp32 [H], where the two parts are mixed by a learned ratio; not in linear layers
    transformer.{name}         a parameter of the transformer as training left it, in any floating type
    lora.{name}.up, .down      [out, r], [r, in]: the parameter changed by up @ down

and in its metadata `format` and `version`, and each field of `SlaSpec` as JSON. Version 2 is a file with linear layers,
which a program that knows version 1 alone would add to sparse attention.

A file without that metadata is taken for a published one if it holds `proj_l`: TurboDiffusion's keys are
`blocks.{i}.self_attn.attn_op.local_attn.proj_l.weight`, those of a module walked by thu-ml/SLA
`blocks.{i}.attn1....proj_l.weight`. The first number in a key is taken for the layer; all other tensors are left alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.arrangement import ORDERS
from dit_accel.errors import EnvironmentProblem, UsageError, unknown_name
from dit_accel.presets import FOLDER, shipped_weights
from dit_accel.rules import check_share

VARIANTS = ("complement", "all")  # the linear part is over the keys that are not read, or over all of them
FEATURES = ("softmax", "elu", "relu")
FORMAT = "dit_accel sla"
VERSION, LINEAR_VERSION = "1", "2"  # without linear layers, with some
PUBLISHED = re.compile(r"(?:^|\.)(\d+)\.(?:.*\.)?proj_l\.(weight|bias)$")


@dataclass(frozen=True)
class SlaSpec:
    """What some weights of SLA were trained for, and on.

    Raises:
        UsageError: a value outside its range.
    """

    n_layers: int  # self-attentions of the transformer, whatever they are
    head_size: int
    transformer: str | None = None  # its class's name; none: the file does not say
    role: str | None = None  # which transformer of its pipeline ("transformer_2" ...); none: the file does not say
    variant: str = "complement"  # one of `VARIANTS`
    feature: str = "softmax"  # one of `FEATURES`
    keep: float = 0.1  # share of key blocks that were read
    negligible: float = 0.0  # share of key blocks in neither part
    order: str = "packed"  # of the tokens
    block: int = 128  # most tokens in one block
    tile: tuple[int, int, int] | None = None  # with order "tiles", of exact edges
    linear_layers: tuple[int, ...] = ()  # those that are linear attention alone

    def __post_init__(self) -> None:
        check_variant(self.variant, self.feature, self.negligible)
        check_share("keep", self.keep)
        if self.order not in ORDERS:
            raise unknown_name("token order", self.order, ORDERS)
        if self.tile is not None:
            object.__setattr__(self, "tile", tuple(self.tile))
        object.__setattr__(self, "linear_layers", tuple(sorted(set(self.linear_layers))))
        for layer in self.linear_layers:
            if not isinstance(layer, int) or not 0 <= layer < self.n_layers:
                raise UsageError(
                    f"linear_layers names layer {layer!r}, of a transformer of {self.n_layers}: give 0 to "
                    f"{self.n_layers - 1}."
                )

    def to_metadata(self) -> dict[str, str]:
        """As safetensors keeps it: texts by name."""
        fields = {name: json.dumps(value) for name, value in dataclasses.asdict(self).items()}
        return {"format": FORMAT, "version": LINEAR_VERSION if self.linear_layers else VERSION, **fields}


def check_variant(variant: str, feature: str, negligible: float) -> None:
    """Refuse what no linear part can be.

    Raises:
        UnknownNameError: no such variant or feature.
        UsageError: a share outside its range, or one that the variant cannot have.
    """
    if variant not in VARIANTS:
        raise unknown_name("variant of SLA", variant, VARIANTS)
    if feature not in FEATURES:
        raise unknown_name("feature map of SLA", feature, FEATURES)
    if not isinstance(negligible, int | float) or isinstance(negligible, bool) or not 0 <= negligible < 1:
        raise UsageError(f"negligible={negligible!r} is not possible: negligible is a share from 0 to below 1.")
    if negligible and variant == "all":
        raise UsageError(
            f"negligible={negligible} with variant 'all' is not possible: there the linear part is over all keys. Use "
            "variant 'complement', or negligible=0."
        )


def read_spec(path: str | Path) -> SlaSpec:
    """Read what a side file was trained for, from its head alone.

    Of a folder it is that of the pipeline's first transformer. A published file says nothing of it: variant "all",
    feature "softmax", keep .1, raster order and blocks of 64 are what its training had (thu-ml/SLA and TurboDiffusion).

    Raises:
        EnvironmentProblem: a file that is missing, unreadable or not safetensors.
        UsageError: a file that holds no weights of SLA, or says what cannot be.
    """
    path = file_for(path, "transformer")
    head = read_head(path)
    metadata = head.pop("__metadata__", {})
    if metadata.get("format") == FORMAT:
        if metadata.get("version") not in (VERSION, LINEAR_VERSION):
            raise UsageError(
                f"{path} is of version {metadata.get('version')!r} of its format, and this program reads {VERSION} and "
                f"{LINEAR_VERSION}: use the version of the program that wrote it, or a later one."
            )
        return _of_metadata(path, metadata)
    found = {int(match[1]): name for name in head if (match := PUBLISHED.search(name)) and match[2] == "weight"}
    if not found:
        raise UsageError(
            f"{path} holds no weights of SLA: neither metadata of format {FORMAT!r} nor tensors named "
            "`...{layer}...proj_l.weight`. Give a file that `save_sla_weights` wrote, or a published checkpoint in "
            "safetensors."
        )
    size = head[found[min(found)]]["shape"][-1]
    return SlaSpec(max(found) + 1, size, variant="all", order="raster", block=64)


def untrained_layers(path: str | Path) -> tuple[int, ...]:
    """The layers that a side file has no weights of: they were dense in training and are to be dense in use.

    Raises:
        As `read_spec`.
    """
    spec = read_spec(path)
    found = (PUBLISHED.search(name) for name in read_head(file_for(path, "transformer")))
    trained = {int(match[1]) for match in found if match and match[2] == "weight"}
    return tuple(sorted(set(range(spec.n_layers)) - trained))


def file_for(path: str | Path, role: str) -> Path:
    """The side file of one transformer of a pipeline: the path itself or, in a folder, the file named by the role.

    The name of weights that ship with the package is their folder, whatever lies where the program runs.
    """
    path = FOLDER / "models" / path if str(path) in shipped_weights() else Path(path)
    return path / f"{role}.safetensors" if os.path.isdir(path) else path


def read_head(path: str | Path) -> dict[str, Any]:
    """The head of a safetensors file: its tensors by name, and `__metadata__`.

    Raises:
        EnvironmentProblem: a file that is missing, unreadable or not safetensors.
    """
    try:
        with Path(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            # safetensors itself refuses heads above 100 MB; other files' first bytes are mostly such a number
            head = json.loads(file.read(size)) if 2 <= size <= 100_000_000 else None
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot read {path}: {error.strerror or error}. Give a side file of SLA, or weights that ship: "
            f"{', '.join(shipped_weights())}."
        ) from None
    except ValueError:
        head = None
    if not isinstance(head, dict):
        raise EnvironmentProblem(f"{path} is not a safetensors file; convert it with safetensors.torch.save_file.")
    return head


def _of_metadata(path: str | Path, metadata: dict[str, str]) -> SlaSpec:
    names = {field.name for field in dataclasses.fields(SlaSpec)}
    try:
        return SlaSpec(**{name: json.loads(text) for name, text in metadata.items() if name in names})
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: its metadata is not what format {FORMAT!r} has ({error}).") from None
