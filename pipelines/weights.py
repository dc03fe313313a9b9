"""Find a model's folder and judge it before anything heavy is imported. No torch: bad paths end at once.

A model is a shipped name, a folder in diffusers' format, or a hub id (`org/name`). Hub ids are looked up in
the local cache first; the hub is asked only for what is not there.
"""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.errors import EnvironmentProblem, UnknownModelError
from dit_accel.presets import model_path, shipped_models

HUB_SECONDS = 3.0  # how long the hub may take to answer at all; a download then takes what it takes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMPONENT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_NO_WEIGHTS = re.compile(r"Tokenizer|Scheduler|Processor|FeatureExtractor")


def locate(model: str, *, download: bool = True) -> Path:
    """The local folder of a model, with all its weights in place.

    Args:
        model: a shipped name, a folder, or a hub id.
        download: whether the hub may be asked for a model that is not in the local cache.

    Raises:
        EnvironmentProblem: no such folder, files missing or corrupt, hub not reachable.
    """
    if model in shipped_models():
        return check_folder(model_path(model))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return check_folder(folder)
    if folder.exists():
        raise EnvironmentProblem(f"model {model} is a file; give the folder that holds its model_index.json")
    if not _HUB_ID.fullmatch(model):
        offer = f" or a shipped name ({', '.join(shipped_models())})" if shipped_models() else ""
        raise EnvironmentProblem(
            f"no model at {model}: give a folder in diffusers' format, a hub id (org/name){offer}"
        )
    return _from_hub(model, download)


def _from_hub(model: str, download: bool) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    except ImportError:
        raise EnvironmentProblem(
            f"{model} is a hub id and huggingface_hub is not installed: pip install 'dit-accel[diffusers]', "
            "or give a local folder with --model"
        ) from None
    try:
        cached = Path(hub.snapshot_download(model, local_files_only=True))
    except Exception:  # not in the cache; the hub's own error classes moved between its releases
        cached = None
    problem: Exception | None = None
    if cached is not None:
        try:
            return check_folder(cached)
        except EnvironmentProblem as error:
            problem = error
    state = (
        f"is incomplete in the cache ({problem})"
        if problem
        else f"is not in the local cache ({HF_HUB_CACHE})"
    )
    if not download:
        raise EnvironmentProblem(f"{model} {state}")
    way_out = "download it where there is a network, or give a folder with --model"
    if HF_HUB_OFFLINE:
        raise EnvironmentProblem(f"{model} {state} and HF_HUB_OFFLINE forbids asking the hub: {way_out}")
    trouble = _no_answer(
        lambda: hub.get_hf_file_metadata(hub.hf_hub_url(model, "model_index.json"), timeout=2)
    )
    if trouble:
        raise EnvironmentProblem(f"{model} {state} and the hub cannot be used ({trouble}): {way_out}")
    index = Path(hub.snapshot_download(model, allow_patterns=["model_index.json"]))
    return check_folder(Path(hub.snapshot_download(model, **_wanted_files(index))))


def _wanted_files(folder: Path) -> dict[str, list[str]]:
    """What of a repository belongs to the pipeline: some hold the same weights once more, for other programs."""
    named = [f"{name}/{kind}" for name in components(folder) for kind in _COMPONENT_FILES]
    return {"allow_patterns": ["model_index.json", *named], "ignore_patterns": ["*.fp16.*", "*.fp16-*"]}


def _no_answer(ask: Callable[[], Any], seconds: float = HUB_SECONDS) -> str | None:
    """Why `ask` failed, or None. It runs in a thread that may be left behind: look-ups ignore time-outs."""
    outcome: list[str | None] = []

    def attempt() -> None:
        try:
            ask()
            outcome.append(None)
        except Exception as error:
            outcome.append(
                f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
            )

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer within {seconds:g} s"


def check_folder(folder: Path) -> Path:
    """The folder itself, if it is a diffusers pipeline with whole safetensors weights.

    Only headers are read: a cut or foreign file is found by its declared size, in milliseconds at any size.
    """
    for component, (_, class_name) in components(folder).items():
        place = folder / component
        if not place.is_dir():
            raise EnvironmentProblem(f"model {folder}: the folder {component}/ ({class_name}) is missing")
        if not _NO_WEIGHTS.search(class_name):
            for file in _weight_files(place):
                check_safetensors(file)
    return folder


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """Component name -> (library, class) from model_index.json, those that the model leaves out excepted."""
    found = {}
    for name, entry in read_index(folder).items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            found[name] = (entry[0], entry[1])
    return found


def left_out(folder: Path) -> list[str]:
    """Names of the components that model_index.json says the model is without."""
    return [
        name for name, entry in read_index(folder).items() if isinstance(entry, list) and entry[:1] == [None]
    ]


def read_index(folder: Path) -> dict[str, Any]:
    """A model's model_index.json."""
    return read_json(folder / "model_index.json", f"{folder} is no diffusers model")


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """The config.json of a model's component, which says what sizes it can make."""
    return read_json(folder / component / "config.json", "the size rule")


def _weight_files(place: Path) -> list[Path]:
    indices = sorted(place.glob("*.safetensors.index.json"))
    if indices:
        table = read_json(indices[0], "a sharded model").get("weight_map", {})
        files = [place / name for name in sorted(set(table.values()))]
    else:
        files = sorted(place.glob("*.safetensors"))
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise EnvironmentProblem(f"weights missing: {missing[0]}{more}; copy or download the model again")
    if files:
        return files
    pickled = sorted(file.name for file in place.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise EnvironmentProblem(
            f"{place} holds only pickled weights ({pickled[0]}), which can run code when opened; dit_accel "
            "reads safetensors only: convert them with save_pretrained on a machine where you trust them"
        )
    raise EnvironmentProblem(
        f"weights missing: no .safetensors file in {place}; copy or download the model again"
    )


def check_safetensors(file: Path) -> None:
    """Raise EnvironmentProblem unless the file's header and length agree. Tensors are not read."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        end = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )
        if end != size - 8 - length:
            raise ValueError(f"{size} bytes where its header declares {end + 8 + length}")
    except OSError as error:
        raise EnvironmentProblem(f"cannot read {file}: {error.strerror or error}") from None
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        why = str(error) if type(error) is ValueError else "its header is not that of a safetensors file"
        raise EnvironmentProblem(f"corrupt weights: {file} ({why}); copy or download it again") from None


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file, or an EnvironmentProblem that says what the file was for."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EnvironmentProblem(f"{what}: {file.name} is missing in {file.parent}") from None
    except OSError as error:
        raise EnvironmentProblem(f"{what}: cannot read {file}: {error.strerror or error}") from None
    except ValueError:
        raise EnvironmentProblem(f"{what}: {file} is not valid JSON") from None
    if not isinstance(content, dict):
        raise EnvironmentProblem(f"{what}: {file} does not hold a JSON object")
    return content


@dataclass(frozen=True)
class Models:
    """The models that a recipe drives."""

    recipe: str  # its name
    pipelines: tuple[str, ...]  # classes in diffusers
    transformers: tuple[str, ...]  # likewise

    def find(self, model: str, *, download: bool = True) -> Path:
        """The local folder of one of these models, its files judged. Imports no torch.

        Args:
            model: a shipped name, a folder, or a hub id.
            download: whether the hub may be asked for a model that is not in the local cache.

        Raises:
            EnvironmentProblem: not found, incomplete or corrupt.
            UnknownModelError: a pipeline or transformer that this recipe does not drive.
        """
        folder = locate(model, download=download)
        pipeline = read_index(folder).get("_class_name")
        if pipeline not in self.pipelines:
            raise UnknownModelError(
                f"{folder} is a {pipeline}; the recipe {self.recipe!r} drives {' or '.join(self.pipelines)}"
            )
        for name, (_, class_name) in components(folder).items():
            if name.startswith("transformer") and class_name not in self.transformers:
                raise UnknownModelError(
                    f"{folder}: its {name} is a {class_name}, of no family that the recipe {self.recipe!r} knows "
                    f"({', '.join(self.transformers)})"
                )
        return folder
