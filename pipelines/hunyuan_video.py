"""HunyuanVideo, text and image to video: load, schedule, run. The denoising loops are diffusers' own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.pipelines.loading import load_stock
from dit_accel.pipelines.running import run_stock
from dit_accel.pipelines.weights import SizeRule, expect, locate, read_json, refuse_branches

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dit_accel.preset import GenerateOptions

MAKES = "video"
_FROM_TEXT, _FROM_IMAGE = "HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"
# AutoencoderKLHunyuanVideo's and the transformer's own defaults, for a config that leaves them out
_SPATIAL, _TEMPORAL, _PATCH = 8, 4, 2
_PIPELINE_STEP = 16  # the pipelines refuse sides that it does not divide


def find(model: str, *, download: bool = True) -> Path:
    """The local folder of a HunyuanVideo model, its files judged. Imports no torch.

    Raises:
        EnvironmentProblem: not found, incomplete or corrupt.
        UnknownModelError: a pipeline or transformer that this recipe does not drive.
    """
    folder = locate(model, download=download)
    expect(folder, "hunyuan_video", (_FROM_TEXT, _FROM_IMAGE), ("HunyuanVideoTransformer3DModel",))
    return folder


def start_image(folder: Path) -> str:
    """Whether a video of this model begins at a picture: "never" or "always". Imports no torch."""
    return "always" if _class_name(folder) == _FROM_IMAGE else "never"


def size_rule(folder: Path) -> SizeRule:
    """What the model in a folder can make, read from its config files. Imports no torch."""
    vae = read_json(folder / "vae" / "config.json", "the size rule")
    dit = read_json(folder / "transformer" / "config.json", "the size rule")
    spatial = vae.get("spatial_compression_ratio", _SPATIAL)
    temporal = vae.get("temporal_compression_ratio", _TEMPORAL)
    return _rule(spatial, temporal, dit.get("patch_size", _PATCH), dit.get("patch_size_t", 1))


def size_rule_of(pipe: Any) -> SizeRule:
    """What a loaded pipeline can make."""
    config = pipe.transformer.config
    spatial, temporal = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    return _rule(spatial, temporal, config.patch_size, config.patch_size_t)


def _rule(spatial: int, temporal: int, patch: int, patch_t: int) -> SizeRule:
    side = math.lcm(_PIPELINE_STEP, spatial * patch)
    return SizeRule(width_step=side, height_step=side, frame_step=math.lcm(temporal, temporal * patch_t))


def load(model: str | Path, **options: Any) -> Any:
    """Load a stock pipeline, ready to run, its VAE in tiles and, where all else is 16-bit on a GPU, in float16.

    Args:
        model: folder or hub id.
        options: device, dtype, offload, flow_shift and loras, as of `loading.load_stock`.

    Raises:
        EnvironmentProblem: model, device or dependency missing, weights corrupt.
        UsageError: an option that cannot be.
    """
    folder = find(str(model))
    pipe = load_stock(folder, _class_name(folder), vae_dtype="float16", **options)
    pipe.vae.enable_tiling()  # a whole clip at once takes more memory than a GPU has
    return pipe


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
        options: size, steps and the like; `guidance` is what the model was distilled to take, so there is one branch
            and no negative prompt; `fps` and `flow_shift` are not looked at here.
        seed: seeds a CPU generator, so that the same seed starts from the same noise on every device.
        image: the first frame, of exactly this size, for a pipeline that begins at one.
        callback: called after each step with the number of steps done. What it raises ends the run.

    Returns:
        uint8 `[F, H, W, 3]`, RGB.

    Raises:
        UsageError: a size or frame count that the model cannot make, or guidance that it does not have.
        DitAccelError: the run produced values that are not finite.
    """
    size_rule_of(pipe).check(options.width, options.height, options.frames)
    refuse_branches(options)
    call: dict[str, Any] = dict(
        prompt=prompt,
        width=options.width,
        height=options.height,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
    )
    if image is not None:
        call["image"] = image
    return run_stock(pipe, call, seed=seed, callback=callback)


def _class_name(folder: Path) -> str:
    return read_json(folder / "model_index.json", f"{folder} is no diffusers model")["_class_name"]
