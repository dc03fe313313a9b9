"""HunyuanVideo, text and image to video: load, schedule, run. The denoising loops are diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.pipelines.limits import SizeRule, refuse_branches
from dit_accel.pipelines.loading import load_stock
from dit_accel.pipelines.running import run_stock
from dit_accel.pipelines.weights import Models, read_config, read_index

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dit_accel.preset import GenerateOptions

MAKES = "video"
_FROM_TEXT, _FROM_IMAGE = "HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"
find = Models("hunyuan_video", (_FROM_TEXT, _FROM_IMAGE), ("HunyuanVideoTransformer3DModel",)).find
# AutoencoderKLHunyuanVideo's and the transformer's own defaults, for a config that leaves them out
_SPATIAL, _TEMPORAL, _PATCH = 8, 4, 2


def start_image(folder: Path) -> str:
    """Whether a video of this model begins at a picture: "never" or "always". Imports no torch."""
    return "always" if read_index(folder)["_class_name"] == _FROM_IMAGE else "never"


def size_rule(folder: Path) -> SizeRule:
    """What the model in a folder can make, read from its config files. Imports no torch."""
    vae, dit = read_config(folder, "vae"), read_config(folder, "transformer")
    spatial = vae.get("spatial_compression_ratio", _SPATIAL)
    temporal = vae.get("temporal_compression_ratio", _TEMPORAL)
    side = dit.get("patch_size", _PATCH)
    return SizeRule.of_videos(spatial, temporal, (dit.get("patch_size_t", 1), side, side))


def size_rule_of(pipe: Any) -> SizeRule:
    """What a loaded pipeline can make."""
    config = pipe.transformer.config
    spatial, temporal = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    return SizeRule.of_videos(spatial, temporal, (config.patch_size_t, config.patch_size, config.patch_size))


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
    pipe = load_stock(folder, read_index(folder)["_class_name"], vae_dtype="float16", **options)
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
        NotFiniteError: the run produced values that are not finite.
    """
    size_rule_of(pipe).check(options.width, options.height, options.frames)
    refuse_branches(options)
    video = dict(num_frames=options.frames, image=image)
    return run_stock(pipe, options, prompt, seed=seed, callback=callback, **video)
