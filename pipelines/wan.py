"""Wan 2.1 and 2.2, text and image to video: load, schedule, run. The denoising loops are diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.pipelines.limits import SizeRule, refuse_second_guidance
from dit_accel.pipelines.loading import load_stock, pick_device, place
from dit_accel.pipelines.running import run_stock
from dit_accel.pipelines.weights import Models, read_config, read_index

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dit_accel.preset import GenerateOptions

__all__ = [
    "MAKES",
    "find",
    "generate",
    "load",
    "pick_device",
    "place",
    "size_rule",
    "size_rule_of",
    "start_image",
]

MAKES = "video"
_FROM_TEXT, _FROM_IMAGE = "WanPipeline", "WanImageToVideoPipeline"
find = Models("wan", (_FROM_TEXT, _FROM_IMAGE), ("WanTransformer3DModel",)).find
# AutoencoderKLWan's own defaults, for a config written before they were config values.
_SPATIAL, _TEMPORAL = 8, 4


def start_image(folder: Path) -> str:
    """Whether a video of this model begins at a picture: "never", "optional" or "always". Imports no torch."""
    index = read_index(folder)
    if index["_class_name"] == _FROM_IMAGE:
        return "always"
    # Wan 2.2 5B: the first frame's tokens have a noise level of their own, so one model does both.
    return "optional" if index.get("expand_timesteps") else "never"


def size_rule(folder: Path) -> SizeRule:
    """What the model in a folder can make, read from its config files. Imports no torch."""
    vae, dit = read_config(folder, "vae"), read_config(folder, "transformer")
    spatial, temporal = vae.get("scale_factor_spatial", _SPATIAL), vae.get("scale_factor_temporal", _TEMPORAL)
    return SizeRule.of_videos(spatial, temporal, dit.get("patch_size", (1, 2, 2)))


def size_rule_of(pipe: Any) -> SizeRule:
    """What a loaded pipeline can make."""
    transformer = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
    return SizeRule.of_videos(
        pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal, transformer.config.patch_size
    )


def load(model: str | Path, *, from_image: bool = False, **options: Any) -> Any:
    """Load a stock WanPipeline or WanImageToVideoPipeline, ready to run. Its VAE always runs in float32.

    Args:
        model: shipped name, folder or hub id.
        from_image: load a model that does both for image to video.
        options: device, dtype, offload, flow_shift and loras, as of `loading.load_stock`.

    Raises:
        EnvironmentProblem: model, device or dependency missing, weights corrupt.
        UsageError: an option that cannot be.
    """
    folder = find(str(model))
    pipeline = _FROM_IMAGE if from_image else read_index(folder)["_class_name"]
    # Wan's documentation asks for the VAE's float32.
    return load_stock(folder, pipeline, vae_dtype="float32", **options)


def generate(
    pipe: Any,
    options: GenerateOptions,
    prompt: str,
    *,
    seed: int,
    image: Image | None = None,
    callback: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Run the pipeline once.

    Args:
        options: size, steps, guidance and the like; `fps` and `flow_shift` are not looked at here.
        seed: seeds a CPU generator, so that the same seed starts from the same noise on every device.
        image: the first frame, of exactly this size, for a pipeline that begins at one.
        callback: called after each step with the number of steps done. What it raises ends the run.

    Returns:
        uint8 `[F, H, W, 3]`, RGB.

    Raises:
        UsageError: a size or frame count that the model cannot make; the message names the nearest.
        NotFiniteError: the run produced values that are not finite.
    """
    size_rule_of(pipe).check(options.width, options.height, options.frames)
    if pipe.config.boundary_ratio is None:
        refuse_second_guidance(options)
    return run_stock(
        pipe,
        options,
        prompt,
        seed=seed,
        callback=callback,
        negative_prompt=options.negative_prompt,
        num_frames=options.frames,
        guidance_scale_2=options.guidance_2,
        image=image,
    )
