"""Stable Diffusion 3 and 3.5, text to image: load, schedule, run. The denoising loop is diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import UsageError
from dit_accel.pipelines.loading import load_stock
from dit_accel.pipelines.running import run_stock
from dit_accel.pipelines.weights import SizeRule, expect, locate, read_json

if TYPE_CHECKING:
    import numpy as np

    from dit_accel.preset import GenerateOptions

MAKES = "image"
_PATCH = 2  # SD3Transformer2DModel's own default


def find(model: str, *, download: bool = True) -> Path:
    """The local folder of a Stable Diffusion 3 model, its files judged. Imports no torch.

    Raises:
        EnvironmentProblem: not found, incomplete or corrupt.
        UnknownModelError: a pipeline or transformer that this recipe does not drive.
    """
    folder = locate(model, download=download)
    expect(folder, "sd3", ("StableDiffusion3Pipeline",), ("SD3Transformer2DModel",))
    return folder


def start_image(folder: Path) -> str:
    """ "never": images of this recipe are made from text alone. Imports no torch."""
    return "never"


def size_rule(folder: Path) -> SizeRule:
    """What the model in a folder can make, read from its config files. Imports no torch."""
    vae = read_json(folder / "vae" / "config.json", "the size rule")
    dit = read_json(folder / "transformer" / "config.json", "the size rule")
    return _rule(2 ** (len(vae.get("block_out_channels", (0,))) - 1), dit.get("patch_size", _PATCH))


def size_rule_of(pipe: Any) -> SizeRule:
    """What a loaded pipeline can make."""
    return _rule(pipe.vae_scale_factor, pipe.patch_size)


def _rule(spatial: int, patch: int) -> SizeRule:
    return SizeRule(width_step=spatial * patch, height_step=spatial * patch, frame_step=None)


def load(model: str | Path, **options: Any) -> Any:
    """Load a stock StableDiffusion3Pipeline, ready to run.

    Args:
        model: folder or hub id. One whose third text encoder was left out runs without it.
        options: device, dtype, offload, flow_shift and loras, as of `loading.load_stock`.

    Raises:
        EnvironmentProblem: model, device or dependency missing, weights corrupt.
        UsageError: an option that cannot be.
    """
    return load_stock(find(str(model)), "StableDiffusion3Pipeline", **options)


def generate(
    pipe: Any,
    options: GenerateOptions,
    prompt: str,
    *,
    seed: int,
    callback: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Run the pipeline once. Both branches of guidance are rows of one batch.

    Args:
        options: size, steps, guidance and the like; `flow_shift` is not looked at here.
        seed: seeds a CPU generator, so that the same seed starts from the same noise on every device.
        callback: called after each step with the number of steps done. What it raises ends the run.

    Returns:
        uint8 `[1, H, W, 3]`, RGB.

    Raises:
        UsageError: a size that the model cannot make, more than one frame, or a second guidance.
        DitAccelError: the run produced values that are not finite.
    """
    size_rule_of(pipe).check(options.width, options.height, options.frames)
    if options.guidance_2 is not None:
        raise UsageError(
            f"guidance_2={options.guidance_2}: this model has one transformer; guidance alone applies"
        )
    call = dict(
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        width=options.width,
        height=options.height,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
    )
    return run_stock(pipe, call, seed=seed, callback=callback)
