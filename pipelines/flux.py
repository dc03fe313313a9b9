"""FLUX.1 dev and schnell, text to image: load, run. The denoising loop is diffusers' own FluxPipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import UsageError
from dit_accel.pipelines.limits import SizeRule, refuse_branches, refuse_second_guidance, vae_step
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
        options: size, steps and the like. `guidance` is what dev was distilled to take, so there is one branch and no
            negative prompt. A model that was not distilled so has a second branch where `guidance` is above 1; schnell
            is meant to run without.
        seed: seeds a CPU generator, so that the same seed starts from the same noise on every device.
        callback: called after each step with the number of steps done. What it raises ends the run.

    Returns:
        uint8 `[1, H, W, 3]`, RGB.

    Raises:
        UsageError: a size that the model cannot make, more than one frame, or guidance that it does not have.
        NotFiniteError: the run produced values that are not finite.
    """
    size_rule_of(pipe).check(options.width, options.height, options.frames)
    more: dict[str, Any] = {"max_sequence_length": text_tokens(pipe)}
    if pipe.transformer.config.guidance_embeds:
        refuse_branches(options)
    else:
        refuse_second_guidance(options)
        more |= _second_branch(options)
    return run_stock(pipe, options, prompt, seed=seed, callback=callback, **more)


def _second_branch(options: GenerateOptions) -> dict[str, Any]:
    """The pipeline's arguments for classifier-free guidance, which it knows by another name than its built-in one."""
    if options.guidance > 1:
        return {"true_cfg_scale": options.guidance, "negative_prompt": options.negative_prompt}
    if options.negative_prompt:
        raise UsageError(
            f"negative_prompt: with guidance={options.guidance:g} there is no negative branch; leave it out, or give "
            "guidance above 1"
        )
    return {}


def text_tokens(pipe: Any) -> int:
    """Tokens that a prompt is padded to: 512, of schnell 256, or fewer for a model made for fewer.

    Padding is read like words, so a small model is given what it was trained with, which its tokenizer says.
    """
    most = _TEXT if pipe.transformer.config.guidance_embeds else _TEXT_OF_SCHNELL
    return min(most, pipe.tokenizer_2.model_max_length)
