"""Find the coloured objects of a clip: where each one is in each frame, and how it covers the pixels.

Objects are saturated and backgrounds nearly grey, so the chroma of a pixel divided by the chroma of a pure colour
is the share of the pixel that the object covers, whatever the background's brightness. An object's dark stripe has
no chroma and reads as a gap; the shape templates have the same gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.quality.scenes import COLOURS

_COVERED = 0.35  # coverage from which a pixel belongs to an object
_SMALLEST = (
    0.0022  # area of the smallest object, in squared shorter sides: a third of a small star's first frame
)
_RIVAL = 0.35  # a second piece of one colour at least this large beside the first is another object
_TINT = 0.2  # chroma of the strongest tint of a whole clip that is taken away; pure colours have 0.6 to 0.7
_NOTICED = 0.4  # share of frames that must show an object


@dataclass(frozen=True)
class Track:
    """One object followed through the clip."""

    colour: str
    cover: Tensor  # fp32 [F, H, W] in [0, 1], nothing of other objects
    seen: Tensor  # bool [F]
    area: Tensor  # fp32 [F], pixels
    centre: Tensor  # fp32 [F, 2], centroid of the cover as (x, y) pixels; NaN where not seen


def measure_cover(frames: Tensor) -> Tensor:
    """Coverage of every pixel by each colour.

    Args:
        frames: fp32 `[F, 3, H, W]` in [0, 1].

    Returns:
        fp32 `[colours, F, H, W]` in [0, 1]; a pixel counts for the colour nearest in hue only.
    """
    pure = torch.tensor(list(COLOURS.values()))
    pure = pure - pure.mean(1, keepdim=True)
    strength = pure.norm(dim=1)
    chroma = _blur(frames - frames.mean(1, keepdim=True))
    # A tint of the whole clip belongs to the background; objects cover far less than half of the pixels. A strong
    # one is no tint: taking it away would turn the rest of the frame into an object of the opposite colour.
    sample = chroma[::4, :, ::4, ::4].transpose(0, 1).flatten(1)
    tint = sample.median(dim=1).values
    chroma = chroma - (tint * (_TINT / tint.norm().clamp_min(_TINT)))[:, None, None]
    along = torch.einsum("fchw,kc->kfhw", chroma, pure / strength[:, None])
    nearest = along.argmax(0)
    cover = along / strength[:, None, None, None]
    own = torch.arange(len(COLOURS))[:, None, None, None] == nearest
    return (cover * own).clamp_(0, 1)


def find_tracks(cover: Tensor) -> list[Track]:
    """Objects that at least `_NOTICED` of the frames show, in the order of `COLOURS`."""
    smallest = _SMALLEST * min(cover.shape[-2:]) ** 2
    tracks = []
    for colour, one in zip(COLOURS, cover, strict=True):
        enough = (one > _COVERED).sum((1, 2)) >= smallest
        if enough.float().mean() < _NOTICED:
            continue
        for pieces in _follow_pieces(one, smallest):
            track = _measure_track(colour, one * pieces, smallest)
            if track.seen.float().mean() >= _NOTICED:
                tracks.append(track)
    return tracks


def _measure_track(colour: str, cover: Tensor, smallest: float) -> Track:
    # Faint haze far from the object would move its centroid.
    cover = torch.where(cover > 0.08, cover, 0.0)
    area = cover.sum((1, 2))
    seen = area >= smallest
    ys, xs = (torch.arange(n, dtype=torch.float32) + 0.5 for n in cover.shape[1:])
    x = (cover.sum(1) * xs).sum(1) / area
    y = (cover.sum(2) * ys).sum(1) / area
    centre = torch.where(seen[:, None], torch.stack([x, y], 1), torch.nan)
    return Track(colour, cover, seen, torch.where(seen, area, 0.0), centre)


def _follow_pieces(cover: Tensor, smallest: float) -> list[Tensor]:
    """Split one colour's coverage into at most two objects: float masks `[F, H, W]`, the larger object first."""
    coarse = F.avg_pool2d(cover[:, None], 2, ceil_mode=True, count_include_pad=False)
    labels = _label_pieces((coarse > _COVERED * 0.8)[:, 0])
    frames, height, width = labels.shape
    flat = labels.flatten(1)
    sizes = torch.zeros(frames, height * width + 1).scatter_add_(
        1, flat, torch.ones_like(flat, dtype=torch.float32)
    )
    sizes[:, 0] = 0
    top, which = sizes.topk(2, dim=1)
    large = torch.stack(
        [top[:, 0] * 4 >= smallest, (top[:, 1] * 4 >= smallest) & (top[:, 1] > _RIVAL * top[:, 0])], 1
    )
    centres = torch.stack([_piece_centres(labels, which[:, i]) for i in range(2)], 1)  # [F, 2, 2]
    if large[:, 1].float().mean() < _NOTICED:
        chosen = [which[:, 0]]
    else:
        chosen = _pair_over_time(which, large, centres)
    masks = []
    for wanted in chosen:
        piece = ((labels == wanted[:, None, None]) & (labels > 0)).float()[:, None]
        # Grown by a few pixels, so that the soft edge and a thin tip cut off by the stripe stay with the object.
        grown = F.max_pool2d(piece, 7, 1, 3)
        masks.append(F.interpolate(grown, size=cover.shape[1:], mode="nearest")[:, 0])
    return masks


def _label_pieces(mask: Tensor) -> Tensor:
    """Number the 8-connected pieces of `[F, H, W]`: 0 outside, equal positive numbers within a piece."""
    inside = mask[:, None].float()
    labels = torch.arange(1, mask[0].numel() + 1, dtype=torch.float32).view(1, 1, *mask.shape[1:]) * inside
    while True:
        spread = labels
        for _ in range(4):
            spread = F.max_pool2d(spread, 3, 1, 1) * inside
        if torch.equal(spread, labels):
            return labels[:, 0].long()
        labels = spread


def _piece_centres(labels: Tensor, which: Tensor) -> Tensor:
    piece = (labels == which[:, None, None]).float()
    total = piece.sum((1, 2)).clamp_min(1)
    ys, xs = (torch.arange(n, dtype=torch.float32) for n in labels.shape[1:])
    return torch.stack([(piece.sum(1) * xs).sum(1) / total, (piece.sum(2) * ys).sum(1) / total], 1)


def _pair_over_time(which: Tensor, large: Tensor, centres: Tensor) -> list[Tensor]:
    """Follow two pieces of one colour from frame to frame by the nearest centre."""
    tracks = [[], []]
    last = [None, None]
    for names, sizes, places in zip(which, large, centres, strict=True):
        pieces = [i for i in range(2) if sizes[i]]
        order = [0, 1]
        if last[0] is not None and last[1] is not None and pieces:
            straight = sum((places[i] - last[i]).norm() for i in pieces)
            crossed = sum((places[i] - last[1 - i]).norm() for i in pieces)
            order = [1, 0] if crossed < straight else [0, 1]
        for i in range(2):
            track = order[i]
            tracks[track].append(names[i] if sizes[i] else torch.tensor(-1))
            if sizes[i]:
                last[track] = places[i]
    return [torch.stack(t) for t in tracks]


def _blur(image: Tensor) -> Tensor:
    """Smooth `[F, C, H, W]` with the 3x3 binomial kernel: sensor-like noise would speckle the coverage."""
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row).expand(image.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel, groups=image.shape[1])
