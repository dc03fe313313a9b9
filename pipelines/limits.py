"""What a model can make, and what options ask for that it does not have. No torch: bad options end at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from dit_accel.preset import GenerateOptions

_PIPELINE_STEP = 16  # diffusers' video pipelines refuse sides that it does not divide, whatever the model


@dataclass(frozen=True)
class SizeRule:
    """Which sizes and frame counts a model can make."""

    width_step: int  # pixels
    height_step: int  # pixels
    frame_step: int | None  # frames = 1 + k * frame_step; none: single images

    @classmethod
    def of_images(cls, step: int) -> SizeRule:
        """Of a model that makes single images, with both sides in steps of so many pixels."""
        return cls(width_step=step, height_step=step, frame_step=None)

    @classmethod
    def of_videos(cls, spatial: int, temporal: int, patch: Sequence[int]) -> SizeRule:
        """Of a model that makes videos.

        Args:
            spatial, temporal: pixels along a side, and frames, of one latent.
            patch: frames, rows and columns of latents in a token.
        """
        return cls(
            width_step=math.lcm(_PIPELINE_STEP, spatial * patch[2]),
            height_step=math.lcm(_PIPELINE_STEP, spatial * patch[1]),
            frame_step=temporal * patch[0],
        )

    def check(self, width: int, height: int, frames: int) -> None:
        """Raise UsageError with the nearest legal size or frame count."""
        near_w, near_h = _nearest(width, self.width_step), _nearest(height, self.height_step)
        if (width, height) != (near_w, near_h):
            raise UsageError(
                f"size {width}x{height}: this model makes widths in steps of {self.width_step} and heights "
                f"in steps of {self.height_step}; the nearest is {near_w}x{near_h}"
            )
        if self.frame_step is None:
            if frames != 1:
                raise UsageError(f"{frames} frames: this model makes single images; leave frames at 1")
            return
        near_f = 1 + self.frame_step * max(0, math.floor((frames - 1) / self.frame_step + 0.5))
        if frames != near_f:
            below = 1 + (frames - 1) // self.frame_step * self.frame_step
            raise UsageError(
                f"{frames} frames: this model makes 1 + {self.frame_step}k frames; "
                f"the nearest are {below} and {below + self.frame_step}"
            )

    def in_shape(self, width: int, height: int, area: int) -> tuple[int, int]:
        """The size in the shape of `width` x `height` with about so many pixels, rounded down to what can be made."""
        high = math.sqrt(area * height / width)
        wide = area / high
        return (
            max(self.width_step, round(wide) // self.width_step * self.width_step),
            max(self.height_step, round(high) // self.height_step * self.height_step),
        )


def vae_step(config: dict[str, Any]) -> int:
    """Pixels along a side of one latent, from the config of an AutoencoderKL: each block but the last halves it."""
    return 2 ** (len(config.get("block_out_channels", (0,))) - 1)


def refuse_branches(options: GenerateOptions) -> None:
    """Raise UsageError where options ask for what a model with distilled guidance does not have."""
    if options.negative_prompt:
        raise UsageError(
            "negative_prompt: this model has its guidance built in and runs without a negative branch; leave it out"
        )
    refuse_second_guidance(options)


def refuse_second_guidance(options: GenerateOptions) -> None:
    """Raise UsageError where options have guidance for a second transformer."""
    if options.guidance_2 is not None:
        raise UsageError(
            f"guidance_2={options.guidance_2}: this model has one transformer; guidance alone applies"
        )


def _nearest(value: int, step: int) -> int:
    return max(step, math.floor(value / step + 0.5) * step)
