"""Training data on disk: clean latents, and what the pipeline tells its transformer beside them.

A folder holds `index.json`, which says how all of it was made, and a safetensors file for every sample. Files get their
names when they are whole, so a folder that was interrupted is gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.errors import DitAccelError, EnvironmentProblem, UsageError
from dit_accel.pipelines.staging import Stage

FORMAT, VERSION = "dit_accel latents", "1"
INDEX = "index.json"
Condition = Mapping[str, Any]  # arguments of the transformer's forward, of one batch row


@dataclass(frozen=True)
class Schedule:
    """The noise levels that a pipeline samples at, noisiest first, and what it tells the transformer of each."""

    sigmas: tuple[float, ...]  # x_t = (1 - sigma) x_0 + sigma noise
    timesteps: tuple[float, ...]
    scale: float  # timestep of sigma 1

    def __post_init__(self) -> None:
        if not self.sigmas or len(self.sigmas) != len(self.timesteps):
            raise UsageError(
                f"a schedule needs as many timesteps as sigmas, and one of each at least; got {len(self.sigmas)} "
                f"sigmas and {len(self.timesteps)} timesteps"
            )

    def below(self, level: float) -> Schedule:
        """The steps at or below a noise level, counted as `dense_above` counts: timestep / training timesteps.

        Raises:
            UsageError: none is left.
        """
        pairs = zip(self.sigmas, self.timesteps, strict=True)
        left = [(sigma, timestep) for sigma, timestep in pairs if timestep / self.scale <= level]
        if not left:
            raise UsageError(
                f"below = {level:g} leaves none of the {len(self.timesteps)} noise levels here, which end at "
                f"{min(self.timesteps) / self.scale:.3f}; give at least that"
            )
        sigmas, timesteps = zip(*left, strict=True)
        return Schedule(sigmas, timesteps, self.scale)


@dataclass(frozen=True)
class Sample:
    """One clip or image.

    `latents` `[1, ...]`, fp32, as the transformer gets them once noised; `conditions`: for each branch of guidance the
    other arguments of its forward, tensors and plain values.
    """

    caption: str
    latents: Tensor
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class Index:
    """How all samples of a folder were made. Those of another index are no continuation of it."""

    transformer: str  # its class
    model: str
    source: str  # "prompts", "videos", "scenes"
    seed: int
    shape: tuple[int, ...]  # of the latents
    schedule: Schedule
    boundary: float | None = None  # of two experts, the second one has the timesteps below it
    guidance: float | None = None  # the scale of the pipeline's runs; None: a folder older than this entry
    guidance_2: float | None = None  # the second expert's; None: as `guidance`

    def part(self, role: str) -> Schedule:
        """The steps of the schedule that one of the pipeline's transformers makes.

        Raises:
            UsageError: a second transformer where there is one, or a transformer that makes no step.
        """
        if role == "transformer" and self.boundary is None:
            return self.schedule
        if self.boundary is None:
            raise UsageError(f"these latents are of {self.model}, which has one transformer; there is no {role}")
        pairs = zip(self.schedule.sigmas, self.schedule.timesteps, strict=True)
        own = [pair for pair in pairs if self.is_own(role, pair[1])]
        if not own:
            raise UsageError(
                f"{role} makes none of the {len(self.schedule.sigmas)} steps of this schedule; make latents with more "
                "--steps"
            )
        sigmas, timesteps = zip(*own, strict=True)
        return Schedule(sigmas, timesteps, self.schedule.scale)

    def is_own(self, role: str, timestep: float) -> bool:
        """Whether a timestep is that transformer's."""
        return self.boundary is None or (timestep >= self.boundary) == (role == "transformer")

    def guidance_of(self, role: str) -> float | None:
        """The guidance scale of one of the pipeline's transformers; None: not known."""
        second = role != "transformer" and self.guidance_2 is not None
        return self.guidance_2 if second else self.guidance

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a folder; EnvironmentProblem where there is none, or one of another format."""
        path = folder / INDEX
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise EnvironmentProblem(
                f"no latents in {folder}: {INDEX} is missing; make them with `finetune_sla.py latents --out {folder}`"
            ) from None
        except ValueError as error:
            raise EnvironmentProblem(f"{path} is no JSON ({error}); make the latents again") from None
        if (told.pop("format", None), told.pop("version", None)) != (FORMAT, VERSION):
            raise EnvironmentProblem(f"{path} is no index of latents, version {VERSION}; make the latents again")
        schedule = {key: tuple(value) if isinstance(value, list) else value for key, value in told["schedule"].items()}
        return cls(**told | {"shape": tuple(told["shape"]), "schedule": Schedule(**schedule)})


class LatentFolder:
    """The samples of a folder, by number.

    Args:
        folder: where they are, or shall be.
        index: how they are made; None reads the folder's own.

    Raises:
        UsageError: the folder holds samples that were made otherwise.
        EnvironmentProblem: no index there.
    """

    def __init__(self, folder: Path, index: Index | None = None) -> None:
        self.folder = folder
        if index is None:
            self.index = Index.read(folder)
        else:
            self.index = index
            self._begin(index)
        self.files = sorted(folder.glob("sample-*.safetensors"))

    def _begin(self, index: Index) -> None:
        if not (self.folder / INDEX).exists():
            with Stage() as stage:
                stage.write_text(self.folder / INDEX, json.dumps(index.to_dict(), indent=1) + "\n")
            return
        held, wanted = Index.read(self.folder), index.to_dict()
        if held.guidance is None:  # an older folder is gone on with as it is
            wanted |= {"guidance": None, "guidance_2": None}
        for key, value in held.to_dict().items():
            if json.dumps(value) != json.dumps(wanted[key]):
                raise UsageError(
                    f"{self.folder} holds latents with {key} = {_shorten(value)}, and {_shorten(wanted[key])} is asked "
                    "for now; choose another folder, or ask for the same to go on with it"
                )

    def path(self, number: int) -> Path:
        return self.folder / f"sample-{number:06d}.safetensors"

    def __len__(self) -> int:
        return len(self.files)

    def write(self, number: int, sample: Sample) -> None:
        """Keep a sample under a number.

        Raises:
            UsageError: latents of another shape than the folder's, or a condition that no file can hold.
        """
        self._check_shape(sample.latents, f"sample {number}")
        tensors, plain = {"latents": sample.latents.float()}, []
        for branch, condition in enumerate(sample.conditions):
            plain.append({})
            for name, value in condition.items():
                if isinstance(value, Tensor):
                    tensors[f"{branch}.{name}"] = value
                elif _is_plain(value):
                    plain[-1][name] = value
                else:
                    raise UsageError(
                        f"the pipeline gives its transformer {name} of type {type(value).__name__}, which cannot be "
                        "kept: tensors, numbers, texts and lists of them can"
                    )
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with Stage() as stage:
            metadata = {"format": FORMAT, "caption": sample.caption, "plain": json.dumps(plain)}
            save_file(tensors, stage.add(self.path(number)), metadata)
        self.files = sorted({*self.files, self.path(number)})

    def read(self, place: int) -> Sample:
        """The sample at a place in the list of those present.

        Raises:
            EnvironmentProblem: a file that is cut or no sample.
            UsageError: latents of another shape than the folder's.
        """
        path = self.files[place]
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise EnvironmentProblem(f"cannot read {path} ({error}); remove it and make the latents again") from None
        if told.get("format") != FORMAT or "latents" not in tensors:
            raise EnvironmentProblem(f"{path} is no sample of latents; remove it and make the latents again")
        latents = tensors.pop("latents")
        self._check_shape(latents, str(path))
        conditions: list[dict[str, Any]] = json.loads(told["plain"])
        for name, tensor in tensors.items():
            branch, _, argument = name.partition(".")
            conditions[int(branch)][argument] = tensor
        return Sample(told["caption"], latents, tuple(conditions))

    def _check_shape(self, latents: Tensor, what: str) -> None:
        if tuple(latents.shape) != self.index.shape:
            raise UsageError(
                f"{what} has latents of shape {tuple(latents.shape)}, and those of {self.folder} are "
                f"{self.index.shape}; one folder holds one size and length: choose another folder for the other"
            )


def join_rows(rows: Sequence[tuple[Tensor, Condition]]) -> tuple[Tensor, dict[str, Any]]:
    """Latents and conditions of several samples as one batch.

    A tensor whose first dimension is 1 belongs to its row and is put beside the others'; anything else (places of
    tokens, say) is for all rows and must be equal in them.

    Raises:
        UsageError: conditions that cannot stand in one batch.
    """
    latents = torch.cat([row for row, _ in rows])
    first, joined = rows[0][1], {}
    for name, value in first.items():
        values = [condition.get(name) for _, condition in rows]
        if isinstance(value, Tensor) and value.ndim and len(value) == 1:
            if any(not isinstance(v, Tensor) or v.shape != value.shape for v in values):
                shapes = sorted({str(tuple(v.shape)) if isinstance(v, Tensor) else str(v) for v in values})
                raise UsageError(
                    f"{name} has the shapes {' and '.join(shapes)} in one batch; give --batch 1, and --accumulate for "
                    "more samples a step (and --guided 0, if these are the branches of one sample)"
                )
            joined[name] = torch.cat(values)
        elif all(_equal(v, value) for v in values):
            joined[name] = value
        else:
            raise UsageError(
                f"{name} differs between the rows of a batch; give --batch 1, and --accumulate for more samples a step "
                "(and --guided 0, if these are the branches of one sample)"
            )
    return latents, joined


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return a == b


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def need_samples(folder: LatentFolder, count: int, what: str) -> None:
    """Raise a DitAccelError where a folder has fewer samples than are needed for something."""
    if len(folder) < count:
        raise DitAccelError(
            f"{folder.folder} holds {len(folder)} samples, and {what} needs {count}; make more with "
            f"`finetune_sla.py latents --count N --out {folder.folder}`"
        )
