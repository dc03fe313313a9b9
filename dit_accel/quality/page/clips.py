"""One prompt as every variant drew it: players, difference, figures and the chart of its frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_accel.bench.results import Quality
from dit_accel.errors import UsageError
from dit_accel.pipelines.video import read_files
from dit_accel.quality.page.charts import draw_frames
from dit_accel.quality.page.drawing import colour_map
from dit_accel.quality.page.media import draw_difference, embed
from dit_accel.quality.page.model import Moving, ShownClip, Table


@dataclass(frozen=True)
class Take:
    """A clip as one variant made it."""

    label: str
    files: tuple[Path, ...]  # a video, an image, or one image a frame
    quality: Quality | None  # against the first take; None for that one
    note: str = ""  # beside its label, as "4.0 s"


def show_clip(key: str, name: str, told: str, takes: Sequence[Take], fps: float | None = None) -> ShownClip:
    """Read the takes' files and bring them into the page, with the difference of the second from the first.

    Args:
        key: the clip's own word on the page.
        name: in the chooser.
        told: what was asked for.
        takes: the reference, the one that is asked about, then any others.
        fps: frames per second; None: as the first file has it.

    Raises:
        UsageError: a file that cannot be read, or takes that differ in size or length.
    """
    asked = takes[1].quality
    clips, rate = [], fps
    for take in takes:
        frames, own = read_files(take.files)
        clips.append(frames)
        rate = rate or own
    if any(frames.shape != clips[0].shape for frames in clips):
        sizes = (f"{take.label} {list(frames.shape)}" for take, frames in zip(takes, clips, strict=True))
        raise UsageError(f"takes of one clip are of one size and length, not {', '.join(sizes)}")
    if len(clips[0]) > 1 and not rate:
        raise UsageError(f"{takes[0].files[0]}: frames without a rate; give frames per second")
    players = [_moving(take, frames, rate, asked.worst_frame) for take, frames in zip(takes, clips, strict=True)]
    players.append(_difference(takes, clips, rate, asked.worst_frame))
    compared = {take.label: take.quality for take in takes if take.quality is not None}
    chart = None
    if len(clips[0]) > 1:
        values = {label: quality.frame_psnr_db for label, quality in compared.items()}
        chart = draw_frames(f"{key}-frames", values, (takes[1].label, asked.worst_frame))
    table = tell_quality(compared, len(clips[0]))
    return ShownClip(name, told, len(clips[0]), rate or 0.0, asked.worst_frame, tuple(players), table, chart)


def name_clip(what: str, quality: Quality, frames: int) -> str:
    """A clip in the chooser: what it is, and how far it is from the reference at its worst."""
    low = quality.worst_psnr_db
    if low is None:
        return f"{what} (equal)"
    return f"{what} ({'worst frame ' if frames > 1 else ''}{low:.1f} dB)"


def tell_quality(compared: dict[str, Quality], frames: int) -> Table:
    """Figures down, variants across: narrow enough for a telephone."""
    values = compared.values()
    rows = [("PSNR, dB", *(_told(q.psnr_db, ".2f", "equal") for q in values))]
    if frames > 1:
        rows.append(("worst frame", *(str(q.worst_frame) for q in values)))
        rows.append(("PSNR of that frame, dB", *(_told(q.worst_psnr_db, ".2f", "equal") for q in values)))
    rows.append(("SSIM", *(_told(q.ssim, ".4f", "frames too small") for q in values)))
    if frames > 1:
        rows.append(("temporal change, ×", *(_told(q.flicker, ".3f", "none at all") for q in values)))
    rows.append(("LPIPS", *(_told(q.lpips, ".4f", "not run") for q in values)))
    return Table("Distance from the first picture", ("figure", *compared), tuple(rows))


def _told(value: float | None, form: str, none: str) -> str:
    return none if value is None else format(value, form)


def _moving(take: Take, frames: object, fps: float | None, worst: int) -> Moving:
    return Moving(take.label, take.note, *embed(frames, fps or 0.0, worst))


def _difference(takes: Sequence[Take], clips: list, fps: float | None, worst: int) -> Moving:
    apart = draw_difference(clips[0], clips[1])
    colours = ", ".join("rgb({} {} {})".format(*colour) for colour in colour_map()[::51])  # 0 and 255 included
    return Moving(
        f"difference × {apart.gain}",
        f"{takes[1].label} from {takes[0].label}",
        *embed(apart.frames, fps or 0.0, worst),
        legend=f"linear-gradient(90deg, {colours})",
        ends=("0", f"{255 / apart.gain:.0f} of 255 or more"),
    )
