"""Pictures of what was read: heat maps of layer by step, and block masks side by side. Pillow alone draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

_TEXT = 13  # font size, pixels
_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)
_DENSE = (225, 225, 225)
# Dark to light at even steps of lightness, so that the order survives grey printing and colour blindness.
_RAMP = ((35, 18, 75), (52, 65, 135), (38, 120, 142), (42, 168, 120), (140, 205, 75), (250, 228, 55))


def draw_heat_map(
    values: np.ndarray, title: str, *, rows: str = "layer", columns: str = "step", missing: str = "none"
) -> Image.Image:
    """Shares as coloured cells, with their percentages where a cell has room for them.

    The colours span the shares there are, rounded outward to whole tenths; the bar beside the map says which.

    Args:
        values: float `[rows, columns]`, 0 to 1; NaN where there is none.
        title: what the shares are.
        rows, columns: what the two axes count, from 0.
        missing: what a cell without a value means.
    """
    if values.ndim != 2 or not values.size:
        raise UsageError(f"a heat map is drawn from values [rows, columns], not from {list(values.shape)}")
    from PIL import Image, ImageDraw

    font = _font()
    height, width = values.shape
    cell_w, cell_h = (min(40, max(4, most // count)) for most, count in ((960, width), (640, height)))
    low, high = _span(values)
    left, top, bar = 58, 32, 92
    across = max(width * cell_w, round(font.getlength(title)), 80 + round(font.getlength(missing)))
    size = (left + across + bar, top + max(height * cell_h, 80) + 44)
    picture = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((left, 8), title, font=font, fill=_INK)
    for (y, x), value in np.ndenumerate(values):
        box = (left + x * cell_w, top + y * cell_h, left + (x + 1) * cell_w - 1, top + (y + 1) * cell_h - 1)
        colour = _DENSE if math.isnan(value) else _colour((value - low) / (high - low))
        pen.rectangle(box, fill=colour)
        if not math.isnan(value) and cell_w >= 24 and cell_h >= 16:
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            pen.text(middle, f"{100 * value:.0f}", font=font, anchor="mm", fill=_readable_on(colour))
    _count_cells(pen, font, height, cell_h, top, left - 6, upright=True)
    _count_cells(pen, font, width, cell_w, left, top + height * cell_h + 3, upright=False)
    pen.text((6, 8), rows, font=font, fill=_FAINT)
    pen.text((left, top + height * cell_h + 22), columns, font=font, fill=_FAINT)
    _draw_bar(pen, font, (size[0] - bar + 18, top, 16, max(height * cell_h, 80)), low, high)
    if np.isnan(values).any():
        at = (left + 60, top + height * cell_h + 24)
        pen.rectangle((*at, at[0] + 12, at[1] + 12), fill=_DENSE)
        pen.text((at[0] + 18, at[1] - 2), missing, font=font, fill=_FAINT)
    return picture


def draw_masks(
    masks: Sequence[Sequence[np.ndarray]], title: str, rows: Sequence[str], columns: Sequence[str]
) -> Image.Image:
    """Block masks in a grid of pictures: a query block to a line, a key block to a column, dark where it is read.

    Masks with more blocks than there are pixels come out in greys: the share that is read.

    Args:
        masks: for each row of the grid one bool `[Nq, Nk]` for each column; all of one shape.
        title: what they are.
        rows: a label for each row.
        columns: a label for each column.
    """
    if not masks or {len(line) for line in masks} != {len(columns)} or len(masks) != len(rows):
        raise UsageError("draw_masks needs a label for each row and column, and as many masks in every row")
    from PIL import Image, ImageDraw

    font = _font()
    edge = max(masks[0][0].shape)
    zoom = max(1, 260 // edge)
    shrink = min(1.0, 420 / edge)
    n_q, n_k = masks[0][0].shape
    height, width = (max(1, round(n * zoom * shrink)) for n in (n_q, n_k))
    left = 12 + max(round(font.getlength(label)) for label in rows)
    top, gap = 64, 14
    note = f"down: {n_q} query blocks, across: {n_k} key blocks; dark is read"
    texts = 26 + max(round(font.getlength(title)), left + round(font.getlength(note)))
    size = (max(left + len(columns) * (width + gap), texts), top + len(rows) * (height + gap) + 24)
    picture = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((8, 8), title, font=font, fill=_INK)
    for x, label in enumerate(columns):
        at = left + x * (width + gap) + width / 2
        pen.text((at, top - 14), label, font=font, anchor="mm", fill=_FAINT)
    for y, (label, line) in enumerate(zip(rows, masks, strict=True)):
        upper = top + y * (height + gap)
        pen.text((6, upper + height / 2), label, font=font, anchor="lm", fill=_FAINT)
        for x, mask in enumerate(line):
            share = Image.fromarray(np.where(mask, 0, 255).astype(np.uint8))
            way = Image.Resampling.NEAREST if shrink == 1 else Image.Resampling.BOX
            corner = (left + x * (width + gap), upper)
            picture.paste(Image.merge("RGB", [share.resize((width, height), way)] * 3), corner)
            frame = (corner[0] - 1, corner[1] - 1, corner[0] + width, corner[1] + height)
            pen.rectangle(frame, outline=_FAINT)
    pen.text((left, size[1] - 22), note, font=font, fill=_FAINT)
    return picture


def _span(values: np.ndarray) -> tuple[float, float]:
    """The tenths around all values, at least two of them, so that equal values do not look like a range."""
    known = values[~np.isnan(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = math.floor(known.min() * 10 + 1e-6) / 10, math.ceil(known.max() * 10 - 1e-6) / 10
    low, high = max(0.0, low), min(1.0, max(high, low + 0.2))
    return min(low, high - 0.2), high


def _colour(share: float) -> tuple[int, int, int]:
    """A colour for 0 to 1, dark to light."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    lower = min(int(place), len(_RAMP) - 2)
    pair = zip(_RAMP[lower], _RAMP[lower + 1], strict=True)
    return tuple(round(a + (b - a) * (place - lower)) for a, b in pair)


def _readable_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = colour
    return _INK if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else _PAPER


def _count_cells(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    count: int,
    cell: int,
    start: int,
    across: int,
    *,
    upright: bool,
) -> None:
    """Numbers along an axis: every cell's, or every second, fifth, tenth, ... where there is no room."""
    room = _TEXT + 2 if upright else 24
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if n * cell >= room or n >= count)
    for i in range(0, count, every):
        middle = start + i * cell + cell / 2
        place, anchor = ((across, middle), "rm") if upright else ((middle, across), "mt")
        pen.text(place, str(i), font=font, anchor=anchor, fill=_FAINT)


def _draw_bar(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    box: tuple[int, int, int, int],
    low: float,
    high: float,
) -> None:
    left, top, width, height = box
    for y in range(height):
        colour = _colour(1 - y / (height - 1))
        pen.line((left, top + y, left + width - 1, top + y), fill=colour)
    for share in (0.0, 0.5, 1.0):
        text = f"{100 * (low + share * (high - low)):.0f} %"
        place = (left + width + 5, top + (1 - share) * (height - 1))
        pen.text(place, text, font=font, anchor={0.0: "lb", 0.5: "lm", 1.0: "lt"}[share], fill=_INK)


def _font() -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(_TEXT)
