"""Shelf: the folder in which measurements are kept, so that none is made twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from dit_accel.errors import UsageError
from dit_accel.pipelines.staging import Stage
from dit_accel.tuning.measure import Vectors
from dit_accel.tuning.runs import Made
from dit_accel.tuning.tables import Gains, Sample, read, write

SETTINGS = "settings.json"
_VECTORS = "vectors.safetensors"


def open_shelf(folder: Path, settings: Mapping[str, Any], resume: bool) -> Shelf:
    """The measurements of these settings.

    Raises:
        UsageError: the folder holds measurements and `resume` was not said, or those of other settings.
    """
    told = json.loads(json.dumps(settings))
    file = folder / SETTINGS
    if file.exists():
        if not resume:
            raise UsageError(
                f"{folder} holds measurements already: go on with --resume, or choose another --name or --out"
            )
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} cannot be read ({error}): remove {folder} and measure again") from None
        other = sorted(key for key in {*told, *before} if told.get(key) != before.get(key))
        if other:
            raise UsageError(
                f"--resume: {folder} was measured with another {', '.join(other)}; give the same, or another --name"
            )
    else:
        with Stage() as stage:
            stage.write_text(file, json.dumps(told, indent=2) + "\n")
    return Shelf(folder)


class Shelf:
    """Reads what is there, or makes it and writes it: each measurement whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _sample_path(self, name: str) -> Path:
        return self.folder / f"sample-{name}.json"

    def has_sample(self, name: str) -> bool:
        return self._sample_path(name).exists()

    def read_sample(self, name: str) -> Sample:
        """One that is there."""
        return read(self._sample_path(name), Sample)

    @property
    def has_gains(self) -> bool:
        return self._gains_path.exists()

    @property
    def _gains_path(self) -> Path:
        return self.folder / "gains.json"

    def sample(self, name: str, make: Callable[[], tuple[Sample, Vectors]], with_vectors: bool) -> Sample:
        """A measured run.

        Args:
            with_vectors: keep what perturbed runs need, too.
        """
        path = self._sample_path(name)
        if path.exists():
            return read(path, Sample)
        sample, vectors = make()
        if with_vectors:
            self._put_vectors(vectors)
        _save(self._frames_path(name), {"frames": vectors.frames})
        write(path, sample)
        return sample

    def _frames_path(self, name: str) -> Path:
        return self.folder / f"frames-{name}.safetensors"

    def frames(self, name: str) -> np.ndarray:
        """The dense frames of a measured run, uint8 [F, H, W, 3]."""
        return _load(self._frames_path(name))["frames"]

    def gains(self, make: Callable[[Vectors], Gains]) -> Gains:
        """The gains; the vectors are let go of behind them."""
        if self.has_gains:
            return read(self._gains_path, Gains)
        gains = make(self._vectors())
        write(self._gains_path, gains)
        (self.folder / _VECTORS).unlink(missing_ok=True)
        return gains

    def dense(self, number: int, velocities: bool, make: Callable[[], Made]) -> Made:
        """A held-out clip as dense makes it. Made again where its velocities are needed and were not kept."""
        path = self.folder / f"dense-{number:03d}.safetensors"
        if path.exists():
            held = _load(path)
            if "velocities" in held or not velocities:
                took, inside, count = held["seconds"].tolist()
                told = held.get("expected")
                expected = None if told is None else tuple(None if np.isnan(x) else x for x in told.tolist())
                return Made(held["frames"], took, inside, int(count), held.get("velocities"), expected=expected)
        made = make()
        held = {"frames": made.frames, "seconds": np.array([made.seconds, made.forward_seconds, made.forwards])}
        if made.expected is not None:
            held["expected"] = np.array([np.nan if x is None else x for x in made.expected])
        if made.velocities is not None:
            held["velocities"] = made.velocities
        _save(path, held)
        return made

    def _put_vectors(self, vectors: Vectors) -> None:
        told = {"velocities": torch.stack(vectors.velocities), "errors": torch.stack(vectors.errors)}
        told |= {"final": vectors.final, "output": vectors.output.float().cpu()}
        arrays = {name: x.numpy() for name, x in told.items()} | {"frames": vectors.frames}
        _save(self.folder / _VECTORS, arrays)

    def _vectors(self) -> Vectors:
        held = _load(self.folder / _VECTORS)
        told = {name: torch.from_numpy(held[name]) for name in ("velocities", "errors", "final", "output")}
        return Vectors(
            list(told["velocities"]), list(told["errors"]), told["final"], told["output"], held["frames"]
        )


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with Stage() as stage:  # safetensors writes the memory as it lies
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, stage.add(path))


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors has an error of its own for a damaged file
        raise UsageError(f"measurement {path} cannot be read ({error}): remove it and run again") from None
