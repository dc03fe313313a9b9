"""Make training samples: denoise prompts with the dense pipeline, or encode clips that are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.training.capture import read_boundary, run_captured
from dit_accel.training.samples import Index, LatentFolder, Sample
from dit_accel.training.sources import Source

if TYPE_CHECKING:
    from dit_accel.preset import GenerateOptions


def make_latents(
    pipe: Any,
    source: Source,
    options: GenerateOptions,
    folder: Path,
    *,
    count: int,
    seed: int,
    model: str,
    share: tuple[int, int] = (0, 1),
    after: Callable[[int], None] | None = None,
) -> LatentFolder:
    """Bring a folder up to `count` samples. Those that are there stay, so an interrupted call is gone on with.

    Args:
        pipe: dense; where it runs is where the latents are made.
        options: size, steps, guidance. The steps are those of the schedule that training draws its noise levels from.
        seed: sample `n` starts from the noise of seed + n.
        model: what the index shall say of it.
        share: (rank, world): this process makes every world-th sample from the rank-th on.
        after: called with the number of each sample that was made.

    Raises:
        UsageError: a size that the model cannot make, or as of `run_captured`, `LatentFolder` and the source.
    """
    if count < 1:
        raise UsageError(f"count = {count}: at least 1 sample is needed")
    latents: LatentFolder | None = None
    for number in _missing(folder, range(share[0], count, share[1])):
        caption, frames = source.caption(number), source.frames(number, options)
        run = run_captured(pipe, options, caption, seed=seed + number, steps=None if frames is None else 1)
        clean = run.latents if frames is None else encode_clip(pipe, frames)
        if latents is None:
            index = Index(
                transformer=type(pipe.transformer).__name__,
                model=model,
                source=source.name,
                seed=seed,
                shape=tuple(clean.shape),
                schedule=run.schedule,
                boundary=read_boundary(pipe, run.schedule),
                guidance=options.guidance,
                guidance_2=options.guidance_2,
            )
            latents = LatentFolder(folder, index)
        latents.write(number, Sample(caption, clean, run.conditions))
        if after is not None:
            after(number)
    return LatentFolder(folder)  # with what other processes have made meanwhile


@torch.no_grad()
def encode_clip(pipe: Any, frames: Tensor) -> Tensor:
    """Latents of a clip, as the transformer gets them.

    Args:
        frames: fp32 `[1, 3, F, H, W]` in [-1, 1].

    Returns:
        fp32 `[1, C, T, h, w]`, normalised as the pipeline does.

    Raises:
        UsageError: a pipeline whose latents are no clip's, or packed into tokens.
    """
    name, vae = type(pipe).__name__, pipe.vae
    if name not in ("WanPipeline", "HunyuanVideoPipeline"):
        raise UsageError(
            f"clips are encoded for WanPipeline and HunyuanVideoPipeline, not for {name}; give prompts, which the "
            "pipeline denoises itself"
        )
    mode = vae.encode(frames.to(vae.device, vae.dtype)).latent_dist.mode().float()
    if name == "HunyuanVideoPipeline":
        return mode * vae.config.scaling_factor
    mean, std = (
        torch.tensor(values, device=mode.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (mode - mean) / std


def _missing(folder: Path, numbers: Iterable[int]) -> list[int]:
    there = {path.stem for path in folder.glob("sample-*.safetensors")}
    return [number for number in numbers if f"sample-{number:06d}" not in there]
