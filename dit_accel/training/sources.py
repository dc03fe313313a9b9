"""Where training samples come from: prompts that the pipeline denoises, folders of videos, rendered scenes.

A source gives captions by number, and the frames that belong to them where there are any. Without frames the dense
pipeline makes the latents itself.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from dit_accel.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from dit_accel.preset import GenerateOptions

VIDEO_SUFFIXES = (".mp4", ".gif")
HELD_OUT_FROM = 1_000_000  # numbers of scenes from here on show what training never does

# Subjects, motions, light and distances of many kinds: what attention has to learn is where to look.
PROMPTS = (
    "A red fox trots through deep snow at dawn, its breath visible in the cold air",
    "Waves break over black rocks in slow motion, spray lit by a low sun",
    "A chef tosses vegetables in a steaming wok in a busy restaurant kitchen",
    "An old tram climbs a steep cobbled street between pastel houses",
    "A hummingbird hovers in front of a purple flower, wings a blur, macro shot",
    "Time lapse of clouds rolling over a mountain ridge at sunset",
    "A child in a yellow raincoat jumps into a puddle on a city pavement",
    "Close-up of hands shaping wet clay on a spinning potter's wheel",
    "A sailing boat leans into the wind on a choppy grey sea",
    "A cat stretches on a windowsill and looks out at falling rain",
    "Aerial view of a winding river through an autumn forest",
    "A street musician plays the violin under an arcade while people walk past",
    "A glass of water tips over on a wooden table, water spreading slowly",
    "Two dogs chase each other across a green meadow, camera following",
    "Neon signs reflect in a wet alley at night as a cyclist rides by",
    "A steam locomotive crosses a stone viaduct, white smoke trailing behind",
    "A ballet dancer turns in an empty hall, sunlight falling through tall windows",
    "Jellyfish drift upwards in dark blue water, glowing softly",
    "A woman reads a letter at a kitchen table and begins to smile",
    "Lava flows down a slope at night and glows between cracks of black crust",
    "A hot air balloon lifts off above a misty valley",
    "A blacksmith hammers glowing iron on an anvil, sparks flying",
    "Camera moves slowly through a library with endless wooden shelves",
    "A herd of horses gallops along a beach, water splashing",
    "A small robot waters a plant on the balcony of a skyscraper",
    "Coffee is poured into a white cup in slow motion, steam rising",
    "A skier carves down a steep slope, snow dust in the air behind",
    "Lanterns float up into the night sky above a crowd",
    "A spider web with dew drops sways in the morning light, macro shot",
    "An astronaut walks across a red desert, footprints behind",
    "A crowded market street in the rain, seen from above, umbrellas moving",
    "A paper boat floats down a narrow stream between mossy stones",
)


class Source(Protocol):
    """Captions by number, and frames for them: fp32 `[1, 3, F, H, W]` in [-1, 1], or None where there are none."""

    name: str  # tells one source from another

    def caption(self, number: int) -> str: ...

    def frames(self, number: int, options: GenerateOptions) -> Tensor | None: ...


@dataclass(frozen=True)
class Prompts:
    """Captions without frames, over and over: each time with another seed."""

    captions: tuple[str, ...] = PROMPTS

    @property
    def name(self) -> str:
        return f"{len(self.captions)} prompts, {_digest(self.captions)}"

    def caption(self, number: int) -> str:
        return self.captions[number % len(self.captions)]

    def frames(self, number: int, options: GenerateOptions) -> None:
        return None


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes, which the small shipped models know.

    Args:
        seed: number `n` is the same scene for the same seed.
        first: number of the first; from `HELD_OUT_FROM` on, scenes show what training never does.
        rendered: whether to give frames; otherwise captions alone.
    """

    seed: int
    first: int = 0
    rendered: bool = True

    @property
    def name(self) -> str:
        kind = "rendered" if self.rendered else "captions of"
        return f"{kind} scenes, seed {self.seed}, from number {self.first}"

    def caption(self, number: int) -> str:
        from dit_accel.quality.scenes import write_caption

        return write_caption(self._scene(number), random.Random(f"words-{self.seed}-{self.first + number}"))

    def frames(self, number: int, options: GenerateOptions) -> Tensor | None:
        from dit_accel.quality.scenes import render_scenes

        if not self.rendered:
            return None
        return render_scenes([self._scene(number)], options.frames, options.height, options.width)

    def _scene(self, number: int):
        from dit_accel.quality.scenes import sample_scene

        place = self.first + number
        return sample_scene(random.Random(f"scene-{self.seed}-{place}"), held_out=place >= HELD_OUT_FROM)


@dataclass(frozen=True)
class Videos:
    """The videos of a folder, each with its caption in a text file of the same name beside it.

    A video is brought to the size asked for: scaled until it covers it, the middle cut out, the first frames taken.

    Raises:
        UsageError: no videos there, a caption that is missing or empty, or later a video that is too short.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not self.files:
            raise UsageError(
                f"no videos in {self.folder}: put {' or '.join(VIDEO_SUFFIXES)} files there, each with its caption "
                "in a .txt of the same name"
            )
        missing = [path.name for path in self.files if not path.with_suffix(".txt").is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UsageError(
                f"no caption for {', '.join(missing[:3])}{more} in {self.folder}: write it into a .txt of the same "
                "name beside the video"
            )
        for number, path in enumerate(self.files):
            if not self.caption(number):
                raise UsageError(f"the caption {path.with_suffix('.txt')} is empty; say in it what the video shows")

    @property
    def files(self) -> tuple[Path, ...]:
        if not self.folder.is_dir():
            raise UsageError(f"no folder of videos at {self.folder}")
        return tuple(sorted(path for path in self.folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES))

    @property
    def name(self) -> str:
        return f"{len(self.files)} videos, {_digest(path.name for path in self.files)}"

    def caption(self, number: int) -> str:
        return self._file(number).with_suffix(".txt").read_text(encoding="utf-8").strip()

    def frames(self, number: int, options: GenerateOptions) -> Tensor:
        from dit_accel.pipelines.video import read_clip

        path = self._file(number)
        try:
            clip, _, _ = read_clip(path)
        except (OSError, ValueError) as error:  # PyAV's errors are of both kinds
            raise EnvironmentProblem(f"cannot read {path}: {error}") from None
        if len(clip) < options.frames:
            raise UsageError(
                f"{path} has {len(clip)} frames and {options.frames} are needed; lower --frames, or take it out"
            )
        return fit_frames(clip[: options.frames], options.height, options.width)

    def _file(self, number: int) -> Path:
        if number >= len(self.files):
            raise UsageError(
                f"{self.folder} holds {len(self.files)} videos, and number {number + 1} is asked for; lower --count"
            )
        return self.files[number]


def fit_frames(clip: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 `[F, H, W, 3]` as fp32 `[1, 3, F, height, width]` in [-1, 1]: scaled to cover it, the middle cut out."""
    frames = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2).float() / 127.5 - 1
    factor = max(height / frames.shape[2], width / frames.shape[3])
    size = [max(side, round(old * factor)) for side, old in zip((height, width), frames.shape[2:], strict=True)]
    if size != list(frames.shape[2:]):
        frames = torch.nn.functional.interpolate(frames, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].transpose(0, 1)[None].clamp(-1, 1)


def _digest(texts) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
