"""Stable Diffusion 3 and 3.5, text to image: load, schedule, run. The denoising loop is diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.pipelines.limits import SizeRule, refuse_second_guidance, vae_step
from dit_accel.pipelines.loading import load_stock
from dit_accel.pipelines.running import run_stock
from dit_accel.pipelines.weights import Models, read_config

if TYPE_CHECKING:
    import numpy as np

    from dit_accel.preset import GenerateOptions

MAKES = "image"
find = Models("sd3", ("StableDiffusion3Pipeline",), ("SD3Transformer2DModel",)).find
_PATCH = 2  # SD3Transformer2DModel's own default
_TEXT = 256  # tokens that StableDiffusion3Pipeline pads a prompt to for the T5, unless told otherwise


def start_image(folder: Path) -> str:
    """ "never": images of this recipe are made from text alone. Imports no torch."""
    return "never"


def size_rule(folder: Path) -> SizeRule:
    """What the model in a folder can make, read from its config files. Imports no torch."""
    patch = read_config(folder, "transformer").get("patch_size", _PATCH)
    return SizeRule.of_images(vae_step(read_config(folder, "vae")) * patch)


def size_rule_of(pipe: Any) -> SizeRule:
    """What a loaded pipeline can make."""
    return SizeRule.of_images(pipe.vae_scale_factor * pipe.patch_size)


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
        NotFiniteError: the run produced values that are not finite.
    """
    size_rule_of(pipe).check(options.width, options.height, options.frames)
    refuse_second_guidance(options)
    more = {"negative_prompt": options.negative_prompt, "max_sequence_length": text_tokens(pipe)}
    return run_stock(pipe, options, prompt, seed=seed, callback=callback, **more)


def text_tokens(pipe: Any) -> int:
    """Tokens that a prompt is padded to for the T5: the pipeline's own number, or fewer for a model made for fewer.

    Padding is read like words, so a small model is given what it was trained with, which its tokenizer says.
    """
    return _TEXT if pipe.tokenizer_3 is None else min(_TEXT, pipe.tokenizer_3.model_max_length)
