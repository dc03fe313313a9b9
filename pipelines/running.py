"""Run a stock pipeline once: the same for all recipes. The denoising loop is diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_accel.errors import NotFiniteError

if TYPE_CHECKING:
    from dit_accel.preset import GenerateOptions

_NOT_FINITE = "the run produced values that are not finite; try --dtype bfloat16 or float32"


def run_stock(
    pipe: Any,
    options: GenerateOptions,
    prompt: str,
    *,
    seed: int,
    callback: Callable[[int], None] | None = None,
    **more: Any,
) -> np.ndarray:
    """Run a pipeline once.

    Args:
        options: size, steps and guidance.
        more: the pipeline's other arguments, its own defaults where they are None.
        seed: seeds a CPU generator, so that the same seed starts from the same noise on every device.
        callback: called after each step with the number of steps done. What it raises ends the run.

    Returns:
        uint8 `[F, H, W, 3]`, RGB; one frame for an image.

    Raises:
        NotFiniteError: the run produced values that are not finite.
    """
    import torch

    def after_step(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        # before decoding, which may clamp what it makes of an infinity; waits for the device, as decoding would
        if step + 1 == pipe.num_timesteps and not torch.isfinite(kwargs["latents"]).all():
            raise NotFiniteError(_NOT_FINITE)
        if callback is not None:
            callback(step + 1)
        return kwargs

    try:
        (made,) = pipe(
            prompt=prompt,
            width=options.width,
            height=options.height,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            **{name: value for name, value in more.items() if value is not None},
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            callback_on_step_end=after_step,
            return_dict=False,
        )
    except BaseException:
        # An aborted run leaves offloaded components on the GPU; the pipeline clears up only at a good end.
        pipe.maybe_free_model_hooks()
        raise
    frames = np.asarray(made[0])  # [F, H, W, 3] or [H, W, 3], 0..1
    if not np.isfinite(frames).all():
        raise NotFiniteError(_NOT_FINITE)
    frames = np.rint(frames * 255).astype(np.uint8)
    return frames if frames.ndim == 4 else frames[None]
