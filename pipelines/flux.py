"""FLUX.1 dev and schnell, text to image: load, run. The denoising loop is diffusers' own FluxPipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.pipelines.loading import load_stock
from dit_accel.pipelines.running import run_stock
from dit_accel.pipelines.weights import SizeRule, expect, locate, read_json, refuse_branches

if TYPE_CHECKING:
    import numpy as np

    from dit_accel.preset import GenerateOptions

MAKES = "image"
_PACKED = 2  # the pipeline makes a token of so many latents each way
# Text tokens: what FluxPipeline takes by default, and what its documentation gives schnell.
_TEXT, _TEXT_OF_SCHNELL = 512, 256


def find(model: str, *, download: bool = True) -> Path:
    """The local folder of a FLUX.1 model, its files judged. Imports no torch.

    Raises:
        EnvironmentProblem: not found, incomplete or corrupt.
        UnknownModelError: a pipeline or transformer that this recipe does not drive.
    """
    folder = locate(model, download=download)
    expect(folder, "flux", ("FluxPipeline",), ("FluxTransformer2DModel",))
    return folder


def start_image(folder: Path) -> str:
    """ "never": images of this recipe are made from text alone. Imports no torch."""
    return "never"


def size_rule(folder: Path) -> SizeRule:
    """What the model in a folder can make, read from its config files. Imports no torch."""
    vae = read_json(folder / "vae" / "config.json", "the size rule")
    return _rule(2 ** (len(vae.get("block_out_channels", (0,))) - 1))


def size_rule_of(pipe: Any) -> SizeRule:
    """What a loaded pipeline can make."""
    return _rule(pipe.vae_scale_factor)


def _rule(spatial: int) -> SizeRule:
    return SizeRule(width_step=spatial * _PACKED, height_step=spatial * _PACKED, frame_step=None)


def load(model: str | Path, **options: Any) -> Any:
    """Load a stock FluxPipeline, ready to run.

    Args:
        model: folder or hub id.
        options: device, dtype, offload, flow_shift and loras, as of `loading.load_stock`.

    Raises:
        EnvironmentProblem: model, device or dependency missing, weights corrupt.
        UsageError: an option that cannot be.
    """
    return load_stock(find(str(model)), "FluxPipeline", **options)


def generate(
    pipe: Any,
    options: GenerateOptions,
    prompt: str,
    *,
    seed: int,
    callback: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Run the pipeline once.

    Args:
        options: size, steps and the like; `guidance` is what dev was distilled to take (schnell takes none), so there
            is one branch and no negative prompt.
        seed: seeds a CPU generator, so that the same seed starts from the same noise on every device.
        callback: called after each step with the number of steps done. What it raises ends the run.

    Returns:
        uint8 `[1, H, W, 3]`, RGB.

    Raises:
        UsageError: a size that the model cannot make, more than one frame, or guidance that it does not have.
        DitAccelError: the run produced values that are not finite.
    """
    size_rule_of(pipe).check(options.width, options.height, options.frames)
    refuse_branches(options)
    distilled = pipe.transformer.config.guidance_embeds
    call = dict(
        prompt=prompt,
        width=options.width,
        height=options.height,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        max_sequence_length=_TEXT if distilled else _TEXT_OF_SCHNELL,
    )
    return run_stock(pipe, call, seed=seed, callback=callback)
