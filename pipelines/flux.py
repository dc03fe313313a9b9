"""FLUX.1 dev and schnell, text to image: load, run. The denoising loop is diffusers' own FluxPipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.pipelines.limits import SizeRule, refuse_branches, vae_step
from dit_accel.pipelines.loading import load_stock
from dit_accel.pipelines.running import run_stock
from dit_accel.pipelines.weights import Models, read_config

if TYPE_CHECKING:
    import numpy as np

    from dit_accel.preset import GenerateOptions

MAKES = "image"
find = Models("flux", ("FluxPipeline",), ("FluxTransformer2DModel",)).find
_PACKED = 2  # the pipeline makes a token of so many latents each way
# Text tokens: what FluxPipeline takes by default, and what its documentation gives schnell.
_TEXT, _TEXT_OF_SCHNELL = 512, 256


def start_image(folder: Path) -> str:
    """ "never": images of this recipe are made from text alone. Imports no torch."""
    return "never"


def size_rule(folder: Path) -> SizeRule:
    """What the model in a folder can make, read from its config files. Imports no torch."""
    return SizeRule.of_images(vae_step(read_config(folder, "vae")) * _PACKED)


def size_rule_of(pipe: Any) -> SizeRule:
    """What a loaded pipeline can make."""
    return SizeRule.of_images(pipe.vae_scale_factor * _PACKED)


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
        NotFiniteError: the run produced values that are not finite.
    """
    size_rule_of(pipe).check(options.width, options.height, options.frames)
    refuse_branches(options)
    return run_stock(pipe, options, prompt, seed=seed, callback=callback, max_sequence_length=text_tokens(pipe))


def text_tokens(pipe: Any) -> int:
    """Tokens that a prompt is padded to: 512, of schnell 256, or fewer for a model made for fewer.

    Padding is read like words, so a small model is given what it was trained with, which its tokenizer says.
    """
    most = _TEXT if pipe.transformer.config.guidance_embeds else _TEXT_OF_SCHNELL
    return min(most, pipe.tokenizer_2.model_max_length)
