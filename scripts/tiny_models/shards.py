"""Weights of a run as safetensors shards, small enough to be carried one by one."""

from __future__ import annotations

import itertools
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 15 * 2**20


def save_shards(tensors: dict[str, Tensor], folder: Path, stem: str) -> list[Path]:
    """Write `stem-1.safetensors`, `stem-2.safetensors`, ... each under `SHARD_BYTES`; old shards are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().clone().contiguous()  # tied weights may not share memory
        size += tensor.nbytes
    paths = []
    for number, shard in zip(itertools.count(1), shards, strict=False):
        path = folder / f"{stem}-{number}.safetensors"
        draft = path.with_suffix(".partial")
        save_file(shard, draft)
        draft.replace(path)
        paths.append(path)
    return paths


def load_shards(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of `stem-*.safetensors`; FileNotFoundError without any."""
    paths = sorted(folder.glob(f"{stem}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no {stem}-*.safetensors in {folder}; train that stage first")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}
