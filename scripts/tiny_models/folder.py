"""Write a trained pipeline as it ships: bf16, diffusers' layout, no file over 15 MB."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def write_folder(pipe: DiffusionPipeline, to: Path) -> None:
    """Write the pipeline next to `to` and swap it in, so that an interrupted export leaves the old one."""
    draft = to.with_name(to.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    pipe.to(torch.bfloat16).save_pretrained(draft, max_shard_size="12MB", safe_serialization=True)
    shutil.rmtree(to, ignore_errors=True)
    draft.replace(to)
    sizes = {f.relative_to(to): f.stat().st_size for f in to.rglob("*") if f.is_file()}
    for part in sorted({name.parts[0] for name in sizes}):
        print(f"{part}: {sum(size for name, size in sizes.items() if name.parts[0] == part)} bytes")
    print(f"{to}: {sum(sizes.values())} bytes in {len(sizes)} files, largest {max(sizes.values())}")
