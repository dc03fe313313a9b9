"""Write clips and images and read them back: MP4, GIF or PNG by suffix. Nothing half-written is left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from dit_accel.errors import UsageError, unknown_name
from dit_accel.pipelines.staging import Stage

SUFFIXES = (".mp4", ".gif", ".png")
IMAGE_SUFFIXES = (".png",)  # of a single image
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")  # what is read as video; the rest Pillow reads
READABLE = (*VIDEOS, ".gif", ".png", ".jpg", ".jpeg", ".webp")
_CRF = "14"  # x264 constant quality: finer than an eye finds, yet not lossless; measure on frames


def check_writable(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raise before the work starts if a clip (or, with `IMAGE_SUFFIXES`, an image) could not be written to `path`.

    A file is created and removed, since permissions alone say nothing about a full or read-only disk; in the
    nearest folder that exists, since missing ones are made only when there is a clip to put there.
    """
    if path.suffix.lower() not in suffixes:
        raise unknown_name("output format", path.suffix or path.name, suffixes)
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        handle, probe = tempfile.mkstemp(dir=folder, prefix=".dit-accel-", suffix=".part")
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def write_clip(path: Path, frames: np.ndarray, fps: float, comment: str | None = None) -> list[Path]:
    """Write a clip in the format that the suffix names.

    Args:
        path: `*.mp4`, `*.gif` or `*.png`. PNG gives one file a frame, from `name-0001.png` on; one frame
            alone is `name.png`.
        frames: uint8 `[F, H, W, 3]`, RGB.
        fps: frames per second. GIF rounds the time of a frame to 10 ms.
        comment: text to keep inside the file.

    Returns:
        The files written.

    Raises:
        EnvironmentProblem: a file cannot be written.
    """
    with Stage() as stage:
        return stage_clip(stage, path, frames, fps, comment)


def stage_clip(
    stage: Stage, path: Path, frames: np.ndarray, fps: float, comment: str | None = None
) -> list[Path]:
    """Write a clip as `write_clip` does, under the temporary names of a stage.

    Returns:
        The files that there will be.
    """
    suffix = path.suffix.lower()
    if suffix != ".png":
        write = {".mp4": _write_mp4, ".gif": _write_gif}[suffix]
        write(stage.add(path), frames, fps, comment)
        return [path]
    numbers = range(1, len(frames) + 1)
    paths = [path] if len(frames) == 1 else [path.with_name(f"{path.stem}-{n:04d}{path.suffix}") for n in numbers]
    for name, frame in zip(paths, frames, strict=True):
        _write_png(stage.add(name), frame[None], fps, comment)
    return paths


def _write_mp4(path: Path, frames: np.ndarray, fps: float, comment: str | None) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        # 4:2:0 is what every player reads, and it needs even sides.
        stream.pix_fmt = "yuv420p" if stream.height % 2 == 0 == stream.width % 2 else "yuv444p"
        # No macroblock tree: x264's reads memory that nobody wrote, and equal frames gave unequal files (PyAV 18.1).
        stream.options = {"crf": _CRF, "preset": "medium", "mbtree": "0"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _write_gif(path: Path, frames: np.ndarray, fps: float, comment: str | None) -> None:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    extra = {"comment": comment.encode()} if comment is not None else {}
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=1000 / fps, loop=0, **extra)


def _write_png(path: Path, frames: np.ndarray, fps: float, comment: str | None) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if comment is not None:
        info.add_text("dit_accel", comment)
    Image.fromarray(frames[0]).save(path, format="PNG", pnginfo=info)


def read_clip(path: Path) -> tuple[np.ndarray, float, str | None]:
    """Frames uint8 `[F, H, W, 3]`, frames per second, and the comment inside, of a video, GIF or image."""
    if path.suffix.lower() in VIDEOS:
        import av

        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            return np.stack(frames), rate, container.metadata.get("comment")
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        comment = image.info.get("dit_accel") or image.info.get("comment")
        milliseconds = image.info.get("duration", 0)
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    text = comment.decode() if isinstance(comment, bytes) else comment
    return np.stack(frames), 1000 / milliseconds if milliseconds else 0.0, text


def read_files(files: Sequence[Path]) -> tuple[np.ndarray, float]:
    """A clip that is one file, or one image a frame.

    Returns:
        Frames uint8 `[F, H, W, 3]`, and frames per second, 0 where the files do not tell.

    Raises:
        UsageError: a file that is missing, broken or of another kind, or frames of several sizes.
    """
    from av.error import FFmpegError

    clips, rate = [], 0.0
    for file in files:
        if file.suffix.lower() not in READABLE:
            raise unknown_name("kind of clip", file.suffix or file.name, READABLE)
        try:
            clip, rate, _ = read_clip(file)
        except (OSError, ValueError, IndexError, FFmpegError) as error:  # IndexError: no video in it
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot read {file}: {reason}; give a whole video or image") from None
        clips.append(clip)
    sizes = {clip.shape[1:3] for clip in clips}
    if len(sizes) > 1:
        told = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise UsageError(f"frames of one clip are of one size, but from {files[0]} on they are {told}")
    return np.concatenate(clips), rate if len(files) == 1 else 0.0
